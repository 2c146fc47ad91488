"""The similarity alignment of :mod:`fact_jax.face.align` on the device, with gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float

from fact_jax.face.align import invert_affine, similarity_transform, template_points


def crop_to_picture(
    points: Float[np.ndarray, "*batch 5 2"], size: int
) -> Float[np.ndarray, "*batch 2 3"]:
    """Where each pixel of a size x size aligned crop lies in the picture with these points."""
    matrices = invert_affine(similarity_transform(points, template_points(size)))
    return matrices.astype(np.float32)


def warp_crops(
    images: Float[Array, "b h w c"], matrices: Float[Array, "b 2 3"], size: int, fill: float
) -> Float[Array, "b size size c"]:
    """Bilinear crops whose pixel p shows the picture at ``matrix @ (p, 1)``.

    ``fill`` is what lies outside of a picture. As ``warp_affine_batch``, in the images' own dtype
    and unrounded.
    """
    y, x = jnp.meshgrid(jnp.arange(size), jnp.arange(size), indexing="ij")
    pixels = jnp.stack([x, y, jnp.ones_like(x)]).astype(jnp.float32)

    def one(image: Float[Array, "h w c"], matrix: Float[Array, "2 3"]) -> Float[Array, "s s c"]:
        across, down = jnp.einsum("ij,jhw->ihw", matrix, pixels)
        channel = partial(map_coordinates, coordinates=[down, across], order=1, cval=fill)
        return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)

    return jax.vmap(one)(images, matrices)
