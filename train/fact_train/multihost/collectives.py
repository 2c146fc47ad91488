"""Collectives over processes: what all decide alike, and what one tells the others."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fact_jax.utils.errors import UserError

_MESSAGE_BYTES = 1000


def process_all(yes: bool) -> bool:
    """Whether this is true on all processes. Every process must call it; waits for all."""
    if jax.process_count() == 1:
        return yes
    return bool(multihost_utils.process_allgather(np.asarray(yes)).all())


def process_max(value: int) -> jax.Array:
    """The maximum over processes, on the devices: nothing waits until it is read.

    Every process must call it at the same place between the same computations.
    """
    if jax.process_count() == 1:
        return jnp.asarray(value, jnp.int32)
    mesh, maximum = _mesh()
    mine = np.full(jax.local_device_count(), value, np.int32)
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    return maximum(jax.make_array_from_process_local_data(sharding, mine))


@contextmanager
def raise_on_all_processes() -> Iterator[None]:
    """Context in which a UserError of one process is raised on all of them, at its end."""
    refused = None
    try:
        yield
    except UserError as error:
        refused = error
    said = process_gather(str(refused or ""))
    if refused is not None:
        raise refused
    for process, message in enumerate(said):
        if message:
            raise UserError(f"process {process} of {len(said)}: {message}")


def process_gather(text: str) -> list[str]:
    """The texts of all processes, by process index, each cut at 1,000 bytes."""
    if jax.process_count() == 1:
        return [text]
    row = np.zeros(_MESSAGE_BYTES, np.uint8)
    data = text.encode()[:_MESSAGE_BYTES]
    row[: len(data)] = np.frombuffer(data, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row)).reshape(-1, _MESSAGE_BYTES)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def process_broadcast(data: bytes) -> bytes:
    """The bytes of process 0, of any length. Every process must call it."""
    if jax.process_count() == 1:
        return data
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    row = np.zeros(size, np.uint8)
    if jax.process_index() == 0:
        row[:] = np.frombuffer(data, np.uint8)
    return multihost_utils.broadcast_one_to_all(row).tobytes() if size else b""


@functools.cache
def _mesh() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.asarray(jax.devices()), ("all",))
    return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
