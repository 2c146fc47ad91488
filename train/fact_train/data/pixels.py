"""Pixel scaling, and jitted functions over many pictures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from fact_jax.models.transface import TransFace
from fact_jax.models.vae import AutoencoderKL

PyTree = Any


def normalize_pixels(images: UInt8[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """0..255 to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def denormalize_pixels(images: Float[Array, "*b h w c"]) -> UInt8[np.ndarray, "*b h w c"]:
    """[-1, 1] (clipped) to 0..255."""
    images = np.asarray(images, np.float32)
    return np.rint(np.clip(images * 0.5 + 0.5, 0, 1) * 255).astype(np.uint8)


def encode_latents(
    vae: AutoencoderKL, images: UInt8[np.ndarray, "n h w 3"]
) -> Float[np.ndarray, "n h w c"]:
    """Scaled latent means of pictures."""
    scale = vae.config.scaling_factor
    return map_module(
        vae, lambda vae, batch: vae.encode(normalize_pixels(batch))[0] * scale, images
    )


def encode_tokens(
    encoder: TransFace, crops: UInt8[np.ndarray, "n s s 3"]
) -> Float[np.ndarray, "n t d"]:
    """Face tokens of aligned crops."""
    return map_module(encoder, lambda enc, batch: enc.tokens(normalize_pixels(batch)), crops)


def map_module(
    module: nnx.Module, function: Callable[[Any, Array], PyTree], values: np.ndarray
) -> PyTree:
    """``function(module, batch)`` of many rows, compiled once for batches of 128."""
    graph, state = nnx.split(module)
    return map_batches(jax.jit(lambda batch: function(nnx.merge(graph, state), batch)), values)


def map_batches(
    function: Callable[[Array], PyTree], values: np.ndarray, batch_size: int = 128
) -> PyTree:
    """A jitted function of many rows; the last batch is filled up with its last row."""
    size = min(batch_size, len(values))
    pieces = []
    for start in range(0, len(values), size):
        batch = pad_batch(values[start : start + size], size)
        pieces.append(jax.tree.map(np.asarray, function(jnp.asarray(batch))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(values)], *pieces)


def pad_batch(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows filled up to ``size`` with the last one."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
