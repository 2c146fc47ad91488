"""Batches of one shape, so that one program is compiled for all of them."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Int


def padded_batches(count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """The indices of each batch of ``count`` items, and how many of them are no padding.

    The last batch is filled up with the last index.
    """
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        yield rows, min(size, count - start)


def map_batches(function: Callable[[np.ndarray], Any], values: np.ndarray, size: int = 128) -> Any:
    """A function of a batch over many rows, up to ``size`` at a time; a tree of NumPy arrays."""
    size = min(size, len(values))
    pieces = [
        jax.tree.map(lambda a, count=count: np.asarray(a)[:count], function(values[rows]))
        for rows, count in padded_batches(len(values), size)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
