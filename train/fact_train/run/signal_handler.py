"""Signal handling: a run stops after the step, on all processes after the same one."""

import collections
import contextlib
import os
import signal
import threading
from typing import Any

import jax

from fact_jax.utils.errors import UserError
from fact_train.multihost.collectives import process_max

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_FAILED = 1000  # larger than any signal


class SignalHandler:
    """Remembers a signal to stop until the step is over; a second one acts at once.

    These are SIGTERM, Ctrl-C, SIGHUP (the terminal is gone) and SIGUSR1 (some batch systems send it
    before time is up). One that is ignored (nohup) stays so.

    A signal, or a full disk, may reach one process alone. So every process tells the others each
    step what it knows, and all do the same after the same step.
    """

    def __init__(self) -> None:
        self.decided: int | None = None
        self._caught: int | None = None
        self._asked: set[int] = set()
        self._before: dict[int, Any] = {}
        self._said: collections.deque = collections.deque()
        # Steps run ahead of the host: a value that is two steps old is there without waiting.
        self._lag = 2 if jax.process_count() > 1 else 0

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def decide(self, failure: UserError | None) -> bool:
        """Stop after this step? To be called by every process after each step.

        ``decided`` is then the signal. Raises ``failure``, or another process's, as a UserError.
        """
        self._said.append(process_max(_FAILED if failure else self._caught or 0))
        if len(self._said) <= self._lag:
            return False
        decided = int(self._said.popleft())
        if decided == _FAILED:
            raise failure or UserError("another process could not write its part of a checkpoint")
        self.decided = decided or None
        return decided > 0

    def _catch(self, number: int, frame: object) -> None:
        if number in self._asked:
            signal.signal(number, self._before[number])
            return signal.raise_signal(number)
        # The handler stays until then: EndingSignals ends the program, perhaps a moment later, for
        # a signal that it finds its own handler restored for.
        self._asked.add(number)
        self._caught = number
        # print() may have been interrupted by this very signal, and cannot be entered twice.
        with contextlib.suppress(OSError):
            os.write(2, b"stopping: saving a checkpoint (once more to stop at once)\n")
