"""The pictures that a request gives to draw over or to be steered by, read and checked."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fact_jax.errors import UserError
from fact_jax.face import read_image
from fact_jax.face.mask import read_mask
from fact_jax.regions import region_masks
from infer.base import Base
from infer.canvas import Canvas
from infer.photos import read_regions
from infer.request import Request


def read_inputs(request: Request, base: Base, batch: int) -> dict[str, Any]:
    """What ``Drawer.draw`` takes of a request beside prompts and people, for ``batch`` pictures.

    Raises UserError for a file that is not of the pictures' size.
    """
    size, found = base.picture_size(request), {}
    regions = read_regions(request.regions, size)
    if regions is not None:
        found["regions"] = regions[None]
        # Said now if a person has no place.
        region_masks(found["regions"], base.latent_size(request), len(base.unet.block_out_channels))
    if request.image is not None:
        found["canvas"] = _read_canvas(request, base, batch)
        found["canvas"].start(request.steps)
    if request.control is not None:
        found["control"] = _read(request.control, "the control picture", size)
        found["control_scale"] = request.control_scale
    return found


def _read_canvas(request: Request, base: Base, batch: int) -> Canvas:
    size = base.picture_size(request)
    image = _read(request.image, "the picture to draw over", size)
    images = np.repeat(image, batch, axis=0)
    if request.image_mask is None:
        return Canvas.whole(images, request.strength, base)
    mask = read_mask(request.image_mask)
    if mask.shape != size or not mask.any():
        raise UserError(
            f"the mask {request.image_mask} is {mask.shape[1]} x {mask.shape[0]}"
            f"{'' if mask.any() else ' and black'}: it must be white where {request.image} "
            f"({size[1]} x {size[0]}) is to be drawn anew, and as large"
        )
    return Canvas.masked(images, np.repeat(mask[None], batch, axis=0), request.strength, base)


def _read(path: Path, what: str, size: tuple[int, int]) -> UInt8[np.ndarray, "1 h w 3"]:
    image = read_image(path)
    if image.shape[:2] != size:
        raise UserError(
            f"{what} {path} is {image.shape[1]} x {image.shape[0]}, what is drawn will be "
            f"{size[1]} x {size[0]}: they must be of one size (see --width and --height)"
        )
    return image[None]
