"""The smallest UNet that has every part: one level, four transformer blocks, random numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from fact_jax.models.unet import UNet, UNetConfig
from tests.models import filled_model

FACE_DIM = 6
TEXT_DIM = 5


def tiny_unet(face_dim: int | None = FACE_DIM) -> UNet:
    """The same base with and without adapters; every parameter, alphas too, is away from 0."""
    config = UNetConfig(
        block_out_channels=(8,),
        down_attention=(True,),
        up_attention=(True,),
        layers_per_block=1,
        cross_attention_dim=TEXT_DIM,
        heads=(2,),
        norm_num_groups=4,
        face_dim=face_dim,
    )
    base, adapters = np.random.default_rng(1), np.random.default_rng(2)

    def fill(path: str, shape: tuple[int, ...]) -> np.ndarray:
        source = adapters if ".face." in path else base
        return 0.3 * source.standard_normal(shape) + (1.2 if "alpha" in path else 0.2)

    return filled_model("unet", config, fill)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
