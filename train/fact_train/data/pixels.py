"""Jitted functions over many pictures."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree, UInt8

from fact_jax.fact import face_condition
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.models.transface import TransFace
from fact_jax.models.vae import AutoencoderKL
from fact_jax.utils.batches import map_batches
from fact_jax.utils.pixels import normalize_pixels

FACT = ResamplerConfig()


def encode_latents(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, "n h w c"]:
    """Scaled latent means of pictures."""
    scale = vae.config.scaling_factor
    return map_module(
        vae, lambda vae, batch: vae.encode(normalize_pixels(batch))[0] * scale, images
    )


def encode_tokens(
    encoder: TransFace, crops: UInt8[np.ndarray, "n s s 3"], taken: ResamplerConfig = FACT
) -> Float[np.ndarray, "n t d"]:
    """What such a resampler takes of aligned crops: face tokens."""
    return map_module(
        encoder, lambda enc, batch: face_condition(enc, normalize_pixels(batch), taken), crops
    )


def map_module(
    module: nnx.Module, function: Callable[[Any, Array], PyTree], values: np.ndarray
) -> PyTree:
    """``function(module, batch)`` of many rows, compiled once for batches of 128."""
    graph, state = nnx.split(module)
    return map_batches(jax.jit(lambda batch: function(nnx.merge(graph, state), batch)), values)


def soften(
    images: Float[Array, "b h w 3"], keys: Key[Array, " b"], most: float
) -> Float[Array, "b h w 3"]:
    """Blur each picture by a random amount up to ``most`` of half its resolution.

    For networks that judge generated pictures, which are less sharp than drawn ones.
    """
    half = jax.image.resize(
        images, (len(images), *(s // 2 for s in images.shape[1:3]), 3), "linear"
    )
    amount = most * jax.vmap(jax.random.uniform)(keys)[:, None, None, None]
    return images + amount * (jax.image.resize(half, images.shape, "linear") - images)
