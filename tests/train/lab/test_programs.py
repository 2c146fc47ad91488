"""Programs as processes: their status, signals that are handed on, several at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fact_train.lab.programs import Programs

SLEEPER = """
import signal, sys, time
caught = []
def catch(number, frame):
    caught.append(number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, catch)
open(sys.argv[1], "w").close()
while not caught:
    time.sleep(0.01)
time.sleep(0.3)
sys.exit(128 + caught[0] if len(caught) == 1 else 1)
"""
LABORATORY = """
import sys
from pathlib import Path
from fact_train.lab.programs import Programs
done = []
with Programs(Path(sys.argv[1]) / "compiled", jobs=1) as programs:
    def work(word):
        done.append(word)
        return programs.call("sleeper", str(Path(sys.argv[1]) / word))
    status = programs.run(work, ["first", "second"])
print(status, *done)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_reaches_the_child_once_and_nothing_more_is_begun(tmp_path, number, whole_group):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    laboratory = subprocess.Popen(
        [sys.executable, "-c", LABORATORY, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    while not (tmp_path / "first").exists():
        assert laboratory.poll() is None
        time.sleep(0.02)
    send = os.killpg if whole_group else os.kill
    send(laboratory.pid, number)
    said, _ = laboratory.communicate(timeout=30)
    assert said.split() == [str(128 + number), "first"]
    assert not (tmp_path / "second").exists()


def test_statuses_and_the_programs_that_are_kept(tmp_path, monkeypatch):
    code = "import os, sys; open(sys.argv[1], 'w').write(os.environ['JAX_COMPILATION_CACHE_DIR'])"
    (tmp_path / "said.py").write_text(f"{code}; sys.exit(int(sys.argv[2]))")
    (tmp_path / "shot.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with Programs(tmp_path / "compiled") as programs:
        assert programs.call("said", str(tmp_path / "a"), "3") == 3
        assert programs.call("shot") == 128 + signal.SIGKILL
        begun = []
        assert programs.run(lambda item: begun.append(item) or item, [0, 7, 0]) == 7
        assert begun == [0, 7]
    assert (tmp_path / "a").read_text() == str(tmp_path / "compiled")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    with Programs(tmp_path / "compiled") as programs:
        assert programs.call("said", str(tmp_path / "b"), "0") == 0
    assert (tmp_path / "b").read_text() == "mine"
