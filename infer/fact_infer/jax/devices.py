"""A batch of pictures shared among the devices of one process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

_AXIS = "pictures"


def over_devices(function: Callable) -> Callable:
    """The function of (states, shared, rows, *more), compiled; each device has its share of rows.

    Nothing passes between devices: a picture needs no other.
    """

    def run(states: dict, shared: dict, rows: Any, *more: Array, shape: Any) -> Any:
        call = functools.partial(function, shape=shape)
        if shape.devices == 1:
            return call(states, shared, rows, *more)
        split = jax.tree.map(lambda a: P() if len(a) % shape.count else P(_AXIS), rows)
        return jax.shard_map(
            call,
            mesh=mesh(shape.devices),
            in_specs=(P(), P(), split, *(P() for _ in more)),
            out_specs=P(_AXIS),
            check_vma=False,
        )(states, shared, rows, *more)

    run.__name__ = function.__name__  # what profiles and the programs kept on disk are called
    return jax.jit(run, static_argnames="shape")


def share(pictures: int, devices: int) -> int:
    """The most devices among which a batch can be split evenly."""
    return max(n for n in range(1, devices + 1) if pictures % n == 0)


def mesh(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.local_devices()[:devices]), (_AXIS,))
