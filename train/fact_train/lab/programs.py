"""Programs of ours as processes, several at a time: signals, shares of the processors, caches."""

import concurrent.futures
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self


class Programs:
    """A context in which programs are called; signals stop them, and what follows is not begun.

    Each of ``jobs`` has an equal share of this process's processors. Programs that JAX compiles are
    kept in the folder ``compiled``, unless JAX_COMPILATION_CACHE_DIR names another.
    """

    def __init__(self, compiled: Path, jobs: int = 1):
        self._jobs, self._stopped = jobs, 0
        self._children: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        kept = {
            "JAX_COMPILATION_CACHE_DIR": str(compiled.absolute()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }
        self._environment = kept | dict(os.environ)
        self._cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        cores = sorted(os.sched_getaffinity(0)) if jobs > 1 else []
        for job in range(jobs):
            self._cores.put(set(cores[job::jobs]))

    def __enter__(self) -> Self:
        self._former = {
            number: signal.signal(number, self._stop)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        self._stopped = number
        for child in list(self._children):
            child.send_signal(number)

    def call(self, module: str, *words: str, quiet: bool = False) -> int:
        """Run a program to its end; the exit status, 128 + signal where one ended it."""
        command = [sys.executable, "-m", module, *words]
        with self._lock:
            if self._stopped:
                return 128 + self._stopped
            # In a group of its own, so that Ctrl-C reaches it once, handed on from here.
            child = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL if quiet else None,
                env=self._environment,
                process_group=0,
            )
            self._children.add(child)
            if self._stopped:  # between the two
                child.send_signal(self._stopped)
        try:
            status = child.wait()
        finally:
            self._children.discard(child)
        if status and self._stopped:
            return 128 + self._stopped
        return status if status >= 0 else 128 - status

    def run(self, work: Callable[[Any], int], items: Sequence[Any]) -> int:
        """``work`` on every item, ``jobs`` at a time; the first status that is not 0 ends it."""
        failed: list[int] = []

        def one(item: Any) -> None:
            if failed:
                return
            cores = self._cores.get()
            try:
                if cores:
                    os.sched_setaffinity(0, cores)  # of this thread, for the children it starts
                if status := work(item):
                    failed.append(status)
            except BaseException:
                failed.append(1)
                raise
            finally:
                self._cores.put(cores)

        with concurrent.futures.ThreadPoolExecutor(self._jobs) as pool:
            for done in [pool.submit(one, item) for item in items]:
                done.result()
        return failed[0] if failed else 128 + self._stopped if self._stopped else 0
