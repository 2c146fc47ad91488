"""Checksums of arrays, the same on any mesh and any number of processes.

Orbax notices missing bytes but not changed ones; and a base that is not saved again needs a name
that changes with its content.
"""

import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt32

from fact_train.engine.state import path_name


def checksums(tree: PyTree) -> dict[str, int]:
    """Leaf path -> a 32-bit sum of its bits, computed where the leaf lives.

    Each word counts (2 i + 1) times, i its place in the flat array: an odd factor, so that any
    single changed word changes the sum. Sums of integers do not depend on their order. Every
    process of a run calls this; each sums its own shards, and the processes meet once, at the end.
    """
    named = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    leaves = [jnp.asarray(leaf) for _, leaf in named]
    parts = jax.device_get([_sums_of_shards(leaf) for leaf in leaves])
    own = np.asarray([sum(map(int, part)) % 2**32 for part in parts], np.uint32)
    total = own
    if jax.process_count() > 1:
        everyone = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, len(own))
        spread = np.asarray([not leaf.is_fully_addressable for leaf in leaves])
        total = np.where(spread, everyone.sum(axis=0, dtype=np.uint32), own)
    return {name: int(value) for (name, _), value in zip(named, total, strict=True)}


def content_hash(tree: PyTree) -> str:
    """Content hash of a tree of arrays: SHA-256 of its paths, shapes, dtypes and checksums.

    Tells contents apart that differ by accident; it is no protection against forgery.
    """
    sums = checksums(tree)
    about = {
        path_name(path): [list(leaf.shape), str(leaf.dtype), sums[path_name(path)]]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _sums_of_shards(leaf: Array) -> list[Array]:
    """The sum of every shard that this process holds; of copies, the first one's alone.

    No program here spans devices, so nothing waits for another process.
    """
    strides = [math.prod(leaf.shape[axis + 1 :]) % 2**32 for axis in range(leaf.ndim)]
    return [
        _sum(
            shard.data,
            np.asarray([part.start or 0 for part in shard.index], np.uint32),
            np.asarray(strides, np.uint32),
        )
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    ]


@jax.jit
def _sum(
    shard: Array, starts: UInt32[Array, " axes"], strides: UInt32[Array, " axes"]
) -> UInt32[Array, ""]:
    unsigned = jnp.dtype(f"uint{8 * shard.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    place = jnp.zeros(shard.shape, jnp.uint32)  # of each element in the whole flat array
    for axis in range(shard.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, shard.shape, axis) + starts[axis]
        place += index * strides[axis]
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
