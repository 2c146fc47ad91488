"""How a program ends: its exit status, and what it says."""

import signal
import subprocess
import sys
import time

import pytest

from fact_jax.utils import errors
from fact_jax.utils.errors import UserError, run_program
from fact_jax.utils.files import atomic_write


def ending(error: BaseException | None):
    def run():
        if error is not None:
            raise error

    return run


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (UserError("a.png is no picture"), 2, "error: a.png is no picture\n"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device\n"),
        (OSError(28, "No space left", "a.png"), 2, "error: a.png: No space left\n"),
        (OSError("a\nb"), 2, "error: a b\n"),
        (MemoryError(), 2, "error: not enough memory\n"),
        (BrokenPipeError(), 141, ""),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(2), 2, ""),
        (SystemExit(None), 0, ""),
    ],
)
def test_status_and_line(error, status, said, capsys):
    assert run_program(ending(error)) == status
    assert capsys.readouterr().err == said


def test_what_was_not_foreseen_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)


PROGRAM = "import sys; from fact_jax.utils.errors import run_program; sys.exit(run_program({}))"


@pytest.mark.parametrize(
    ("run", "shell", "status", "said"),
    [
        ("lambda: print(9)", "| true", 141, ""),
        ("lambda: print(9)", "> /dev/full", 2, "error: No space left on device\n"),
        ("lambda: sys.exit(print(9))", "| true", 141, ""),
        ("lambda: 1 // 0", "2> /dev/full", 1, ""),
        ("lambda: open('/nowhere/a')", "2> /dev/full", 2, ""),
        ("lambda: print(9)", ">&-", 0, ""),
    ],
)
def test_output_that_goes_nowhere(run, shell, status, said):
    """A reader that is gone, a full device, a closed descriptor: Python adds nothing at its end."""
    command = f'"$0" -c "$1" {shell}; exit ${{PIPESTATUS[0]}}'
    words = ["bash", "-c", command, sys.executable, PROGRAM.format(run)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_cleans_up(number, tmp_path, monkeypatch):
    """Here and not in a process: the program's own handlers, and those before it again after."""
    monkeypatch.setattr(errors, "_leave_at_once", lambda status: None)
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)

    def run():
        with atomic_write(tmp_path / "a"):
            assert list(tmp_path.iterdir())
            signal.raise_signal(number)

    try:
        for _ in range(2):
            assert run_program(run) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)  # as nohup does
        assert run_program(lambda: signal.raise_signal(number)) == 0
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


LOSES = {
    "a callback of the garbage collector": "gc.callbacks.append(stuck), gc.collect(), alive()",
    "a destructor": 'exec(\'type("", (), {"__del__": stuck})()\'), alive()',
    "another error": "exec('try: stuck()\\nexcept BaseException: raise ImportError')",
    "a handler of every error": "exec('try: stuck()\\nexcept BaseException: pass'), alive()",
    "compiled code": "say(), hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}
STUCK = """
import gc, hashlib, signal, sys, time
from fact_jax.utils.errors import run_program
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def say(): print("here", flush=True)
def stuck(*_):
    gc.callbacks.clear(); say(); alive()
def alive():
    end = time.monotonic() + 60
    while time.monotonic() < end: time.sleep(0.01)
sys.exit(run_program(lambda: [{}]))
"""


@pytest.mark.parametrize("lost", LOSES.values(), ids=LOSES.keys())
def test_an_interruption_that_python_loses(lost):
    command = [sys.executable, "-c", STUCK.format(lost)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, b"")


def test_a_loop_that_stops_by_itself_is_left_alone(monkeypatch):
    """It has taken the signal over, as training does to save a checkpoint first."""

    def run():
        seen = []
        before = signal.signal(signal.SIGTERM, lambda *_: seen.append(1))
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
        signal.signal(signal.SIGTERM, before)
        return len(seen)

    assert run_program(run) == 1
