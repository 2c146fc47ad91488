"""Decisions that every process of a run takes alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def process_all(yes: bool) -> bool:
    """Do all processes say yes? Every process must ask; waits for all of them."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def process_max(value: int) -> jax.Array:
    """The largest of all processes' values, on the devices: nobody waits until it is read.

    Every process must call it at the same place between the same computations.
    """
    if jax.process_count() == 1:
        return jnp.asarray(value, jnp.int32)
    mesh, maximum = _mesh()
    mine = np.full(jax.local_device_count(), value, np.int32)
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    return maximum(jax.make_array_from_process_local_data(sharding, mine))


@functools.cache
def _mesh():
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
