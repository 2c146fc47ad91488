"""Batches of labelled portraits from identity numbers and scene seeds."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from fact_jax.portraits.captions import captions
from fact_jax.portraits.identity import sample_identity
from fact_jax.portraits.render import Portrait, render
from fact_jax.portraits.scene import sample_scene
from fact_jax.utils.batches import padded_batches


@partial(jax.jit, static_argnames="size")
def portraits(ids: Int[Array, "b"], seeds: Int[Array, "b"], size: int = 64) -> Portrait:
    """Draw the people `ids` in the scenes `seeds`."""
    return render(sample_identity(ids), sample_scene(seeds), size)


class Batch(NamedTuple):
    """Portraits on the host, as a data set holds them."""

    ids: Int[np.ndarray, "n"]
    images: UInt8[np.ndarray, "n h w 3"]
    portrait: Portrait  # all fields as numpy, `image` included
    captions: list[str]


def to_uint8(images: Float[np.ndarray, "*b h w 3"]) -> UInt8[np.ndarray, "*b h w 3"]:
    """[0, 1] -> 0..255, rounded."""
    return (np.clip(images, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def make_batch(
    ids: Sequence[int] | Int[np.ndarray, "n"],
    seeds: Sequence[int] | Int[np.ndarray, "n"],
    size: int = 64,
    chunk: int | None = None,
) -> Batch:
    """Draw any number of portraits into numpy arrays.

    The last chunk is filled up and cut off again, so that there is one shape to compile.
    """
    ids, seeds = np.asarray(ids, np.int32), np.asarray(seeds, np.int32)
    if ids.shape != seeds.shape or ids.ndim != 1 or ids.size == 0:
        raise ValueError(f"ids and seeds are equally long lists, got {ids.shape}, {seeds.shape}")
    if chunk is None:
        # Small enough to stay in a core's cache on a CPU; large enough to fill an accelerator.
        chunk = 16 if jax.default_backend() == "cpu" else 512
    pieces, lines = [], []
    for rows, _ in padded_batches(ids.size, chunk):
        piece = portraits(jnp.asarray(ids[rows]), jnp.asarray(seeds[rows]), size)
        lines += captions(sample_scene(jnp.asarray(seeds[rows])))
        pieces.append(jax.tree.map(np.asarray, piece))
    portrait = jax.tree.map(lambda *a: np.concatenate(a)[: ids.size], *pieces)
    return Batch(ids, to_uint8(portrait.image), portrait, lines[: ids.size])
