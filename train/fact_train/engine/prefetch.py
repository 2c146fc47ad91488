"""Prefetching: a thread puts batches on the devices, ahead of the step."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


@contextlib.contextmanager
def prefetch(
    batches: Iterator[dict[str, np.ndarray]],
    to_devices: Callable[[dict[str, np.ndarray]], dict[str, jax.Array]],
    start: int,
    stop: int,
) -> Iterator[Iterator[tuple[int, dict[str, jax.Array]]]]:
    """(step, its batch on the devices) for start < step <= stop, made by a thread."""
    ready: queue.Queue[Any] = queue.Queue(2)
    closing = threading.Event()

    def put(item: Any) -> None:
        while not closing.is_set():
            with contextlib.suppress(queue.Full):
                return ready.put(item, timeout=0.1)

    def work() -> None:
        try:
            for step in range(start, stop):
                if closing.is_set():
                    return
                put((step + 1, to_devices(next(batches))))
            put(None)
        except BaseException as error:
            put(error)

    def consume() -> Iterator[tuple[int, dict[str, jax.Array]]]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=work, name="data", daemon=True)
    thread.start()
    try:
        yield consume()
    finally:
        closing.set()
        thread.join()
