"""A thread pool's map over many tensors; copying, hashing and writing release the GIL."""

import concurrent.futures
import os
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

Given = TypeVar("Given")
Found = TypeVar("Found")

THREADS = min(4, os.cpu_count() or 1)
"""As many tensors as this are in memory at once."""


def thread_map(work: Callable[[Given], Found], items: Sequence[Given]) -> Generator[Found]:
    """``map``, several at a time; the results come in order.

    The first exception comes out here, and what had not begun then never begins.
    """
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
