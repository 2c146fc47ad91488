"""Error messages for the terminal, and exit codes."""

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fact_jax.utils.signals import EndingSignals

_BAD_INPUT = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141
"""What a shell says of a program that a signal ended: 128 + SIGINT, 128 + SIGPIPE."""


class UserError(Exception):
    """Bad input: one line that says what was wrong, where, and what to do.

    Programs print it as ``error: ...`` and exit with code 2; the library raises it. What a file
    says may stand in it: as text, whatever would steer a terminal is escaped.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """A text for the terminal: characters that cannot be seen are escaped as Python does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def first_line(error: BaseException, length: int | None = None) -> str:
    """The first line of an error's message, or its class where it has none; cut at ``length``."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:length]


@contextlib.contextmanager
def error_context(source: object) -> Iterator[None]:
    """Put ``source`` (a path) before the message of a UserError that does not begin with it."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(source)):
            raise
        raise UserError(f"{source}: {error}") from error


def run_program(run: Callable[[], int | None]) -> int:
    """Run a command line and give its exit status: that of ``run``, or 0 where it gives None.

    After UserError, OSError (a full disk) or MemoryError one line on stderr says what was wrong and
    the status is 2. It is 130 after Ctrl-C, and 141, without a word, where nobody reads the output
    any more. SIGTERM and SIGHUP end it with 143 and 129, once temporary files are removed.
    argparse's way out (SystemExit) becomes a status too.
    """
    signals = EndingSignals()
    try:
        try:
            with signals:
                status = run()
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int | None) else 1
        except BaseException:
            # What a signal raised may come out as another error, of an import or a callback.
            if signals.caught is None:
                raise
        if signals.caught is not None:
            status = 128 + signals.caught
            _leave_at_once(status)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status or 0
    except UserError as error:
        return _failed(str(error))
    except BrokenPipeError:
        return _BROKEN_PIPE
    except OSError as error:
        return _failed(describe_os_error(error))
    except MemoryError as error:
        return _failed(f"not enough memory: {error}" if str(error) else "not enough memory")
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        for stream in (sys.stdout, sys.stderr):
            _settle(stream)


def _leave_at_once(status: int) -> None:
    """Have Python's end skip what waits for compiled functions that call back into Python."""
    atexit.register(os._exit, status)


def describe_os_error(error: OSError) -> str:
    """An error of the operating system on one line: the file, if it is known, and the reason."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _failed(line: str) -> int:
    with contextlib.suppress(OSError):  # nobody may read that either
        print(f"error: {printable(line)}", file=sys.stderr)
    return _BAD_INPUT


def _settle(stream: Any) -> None:
    """Flush a text stream, or drop what it cannot write: Python would fail again at its very end.

    None stands for a closed one, and whatever has ``flush`` for an open one.
    """
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
