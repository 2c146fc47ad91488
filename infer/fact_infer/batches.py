"""Batches of one shape, so that one program is compiled for all of them."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def padded_batches(count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], int]]:
    """The indices of each batch of ``count`` items, and how many of them are no padding.

    The last batch is filled up with the last index.
    """
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)
        yield rows, min(size, count - start)
