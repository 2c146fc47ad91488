"""A few threads over many tensors: copying, hashing and writing leave the interpreter free."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Given, Found = TypeVar("Given"), TypeVar("Found")

THREADS = min(4, os.cpu_count() or 1)
"""As many tensors as this are in memory at once."""


def thread_map(
    work: Callable[[Given], Found],
    items: Sequence[Given],
    ahead: Callable[[Given], None] = lambda item: None,
) -> Iterator[Found]:
    """``map``, several at a time; the results come in order.

    ``ahead`` is called with each item while those before it are worked on. The first exception
    comes out here, and what had not begun then never begins.
    """

    def one(number: int) -> Found:
        for item in items[number + 1 : number + 1 + THREADS]:
            ahead(item)
        return work(items[number])

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(one, number) for number in range(len(items))]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
