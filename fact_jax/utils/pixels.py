"""Pixels as bytes, and as networks see them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def normalize_pixels(images: UInt8[Array | np.ndarray, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """0..255 to [-1, 1], float32."""
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def denormalize_pixels(images: Float[Array | np.ndarray, "*b h w c"]) -> UInt8[Array, "*b h w c"]:
    """[-1, 1] (clipped) to 0..255, rounded."""
    unit = jnp.clip(jnp.asarray(images, jnp.float32) * 0.5 + 0.5, 0, 1)
    return jnp.round(unit * 255).astype(jnp.uint8)
