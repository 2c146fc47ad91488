"""Ctrl-C, SIGTERM and SIGHUP end a program in every case.

Python raises KeyboardInterrupt in the main thread as soon as that runs Python. In a program that
uses JAX this is not enough: while a function compiles or runs it runs none, an exception that meets
a callback of the garbage collector or a destructor is lost, and one that meets an import or a
callback of a compiled function comes out as another error.
"""

import contextlib
import os
import signal
import sys
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EVERY, _PATIENCE = 0.1, 2.0
"""Seconds: between two attempts to stop the main thread, and until it is stopped by force."""


class EndingSignals:
    """A context in which the three signals raise, until what they raise gets through.

    Ctrl-C raises KeyboardInterrupt, the others SystemExit. While that is on its way out nothing is
    raised again, so that what has to be cleaned up is. A main thread that does not answer, being in
    compiled code, is not waited for: the process ends with 128 plus the signal's number. ``caught``
    is that number. Signals that somebody ignores or handles are left alone.
    """

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}
        self._answered, self._done = threading.Event(), threading.Event()

    def __enter__(self) -> "EndingSignals":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._raise)
        if self._before:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            # The system's handler writes there, whatever the main thread is doing.
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if not self._before:
            return
        signal.set_wakeup_fd(self._wakeup)
        with contextlib.suppress(BlockingIOError):  # full of signals: it is awake
            os.write(self._writer, b"\0")
        self._watcher.join()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        os.close(self._reader)
        os.close(self._writer)

    def _raise(self, number: int, frame: object) -> None:
        self._answered.set()
        if self._done.is_set() or (self.caught is not None and _on_its_way()):
            return
        self.caught = number
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def _watch(self) -> None:
        number = 0
        while not self._is_ours(number):
            (number,) = os.read(self._reader, 1)
            if self._done.is_set():
                return
        main = threading.main_thread().ident
        assert main is not None  # it has been started
        while not self._done.wait(_EVERY):
            self._answered.clear()
            signal.pthread_kill(main, number)
            if not self._answered.wait(_PATIENCE) and not self._done.is_set():
                os._exit(128 + number)

    def _is_ours(self, number: int) -> bool:
        """Not one that a loop inside, which ends at its next step, has taken over."""
        return number in self._before and signal.getsignal(number) == self._raise

    def _unraisable(self, lost: Any) -> None:
        if self.caught is None or not isinstance(lost.exc_value, KeyboardInterrupt | SystemExit):
            self._hook(lost)


def _on_its_way() -> bool:
    """Is what a signal raised being handled where the main thread is?"""
    error = sys.exc_info()[1]
    while error is not None and not isinstance(error, KeyboardInterrupt | SystemExit):
        error = error.__context__
    return error is not None


def _forget_wakeup() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


# A forked child shares the pipe: its signals are not its parent's.
os.register_at_fork(after_in_child=_forget_wakeup)
