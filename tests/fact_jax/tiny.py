"""The smallest UNet that has every part: one level, four transformer blocks, random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fact_convert.weights import abstract_state
from fact_jax.models.unet import UNet, UNetConfig

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
    graph, variables = abstract_state("unet", config)
    base, adapters = np.random.default_rng(1), np.random.default_rng(2)
    filled = []
    for path, variable in variables.items():
        source = adapters if ".face." in path else base
        value = 0.3 * source.standard_normal(variable.get_value().shape) + 0.2
        if "alpha" in path:
            value += 1.0
        keys = tuple(int(key) if key.isdigit() else key for key in path.split("."))
        filled.append((keys, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(graph, nnx.from_flat_state(filled))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
