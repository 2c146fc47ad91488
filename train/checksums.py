"""Sums over the bits of arrays, the same on any mesh and any number of processes.

Orbax notices missing bytes but not changed ones; and a base that is not saved again needs a name
that changes with its content.
"""

import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt32

from train.state import path_name

PyTree = Any


def checksums(tree: PyTree) -> dict[str, int]:
    """Leaf path -> a 32-bit sum of its bits, computed where the leaf lives.

    Each word counts (2 i + 1) times, i its place in the flat array: an odd factor, so that any
    single changed word changes the sum. Sums of integers do not depend on their order.
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    sums = jax.device_get([_sum(jnp.asarray(leaf)) for _, leaf in named])
    return {name: int(value) for (name, _), value in zip(named, sums, strict=True)}


def content_hash(tree: PyTree) -> str:
    """A name for what a tree of arrays holds: its paths, shapes, types and checksums.

    Tells contents apart that differ by accident; it is no protection against forgery.
    """
    sums = checksums(tree)
    about = {
        path_name(path): [list(leaf.shape), str(leaf.dtype), sums[path_name(path)]]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@jax.jit
def _sum(leaf: Array) -> UInt32[Array, ""]:
    # Not flattened: that would gather a leaf which is split over a mesh.
    unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    return jnp.sum(bits * (2 * _place(leaf.shape) + 1), dtype=jnp.uint32)


def _place(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Each element's index in the flat array."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :])
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    return place
