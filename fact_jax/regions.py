"""Regional conditioning: masks of several people at the token resolutions of a UNet."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float

from fact_jax.face.mask import area_weights
from fact_jax.utils.errors import UserError

Regions = Mapping[int, Bool[np.ndarray, "b k _"]]
"""For every resolution, by its number of tokens n: who of k people is drawn in which token."""


def region_masks(
    regions: Float[np.ndarray, "b k h w"], size: tuple[int, int], levels: int
) -> Regions:
    """Masks in [0, 1] of any size to the tokens of every level of a UNet.

    ``size`` is that of the latents (height, width), which each level halves, rounded up. A token
    is a person's where their mask, averaged over the token's area, is above 1/2. Computed on the
    host, so that all backends decide alike. Raises UserError for a region that no token is in.
    """
    share = _resized(regions, size)
    empty = np.argwhere(~(share > 0.5).any(axis=(2, 3)))
    if len(empty):
        raise UserError(
            f"region {empty[0][1] + 1} has no place in the picture: it covers more than half of no "
            f"token ({size[0]} x {size[1]} of them)"
        )
    found = {}
    for _ in range(levels):
        share = _resized(regions, size)
        found[size[0] * size[1]] = (share > 0.5).reshape(*share.shape[:2], -1)
        size = (size[0] + 1) // 2, (size[1] + 1) // 2
    return found


def _resized(regions: np.ndarray, size: tuple[int, int]) -> Float[np.ndarray, "b k h w"]:
    rows, columns = (
        area_weights(inputs, outputs)
        for inputs, outputs in zip(regions.shape[2:], size, strict=True)
    )
    return rows @ regions @ columns.T
