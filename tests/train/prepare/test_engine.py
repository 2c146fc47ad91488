"""The same bytes from one process, from Beam's, and from a build that was killed many times."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from fact_jax.utils.errors import UserError
from fact_train.cli.main import main
from fact_train.prepare.build import build
from fact_train.prepare.engine import Engine
from fact_train.prepare.settings import BuildSettings
from tests.train.prepare.conftest import write_photo

pytestmark = pytest.mark.heavy
pytest.importorskip("apache_beam")

OPTIONS = {"size": 64, "crop": 48, "chunk": 2, "batch": 2, "shard_megabytes": 0.2}


def digests(out):
    files = (path for path in out.rglob("*") if path.is_file() and "work" not in path.parts)
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Twelve people of three photos, one of them broken."""
    source = tmp_path_factory.mktemp("source")
    for number in range(36):
        write_photo(source / f"p{number // 3}" / f"{number % 3}.png", seed=number)
    (source / "p4" / "1.png").write_bytes(b"no picture")
    return source


@pytest.fixture(scope="module")
def whole(people, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    built = build(BuildSettings(source=str(people), splits={"test": 0.2}, **OPTIONS), str(out))
    assert (built.summary["in"], built.summary["records"]) == (36, 35)
    assert built.summary["splits"]["train"]["shards"] > 1
    return digests(out)


def command(people, out, *more):
    sizes = ["--size", "64", "--crop", "48", "--chunk", "2", "--batch", "2", "--shard-mb", "0.2"]
    program = [sys.executable, "-m", "fact_train", "data", "build", str(people), str(out)]
    return [*program, *sizes, "--split", "test=0.2", *more]


def test_beams_own_runner_writes_the_same_bytes(people, whole, tmp_path):
    engine = Engine(1, ("--direct_num_workers=1",))
    settings = BuildSettings(source=str(people), splits={"test": 0.2}, **OPTIONS)
    build(settings, str(tmp_path / "out"), engine)
    assert digests(tmp_path / "out") == whole


def test_a_runner_that_does_not_start_is_one_line(people, tmp_path):
    engine = Engine(1, ("--runner=NoRunner",))
    settings = BuildSettings(source=str(people), **OPTIONS)
    with pytest.raises(UserError, match=r"^photos: the pipeline stopped: .*NoRunner"):
        build(settings, str(tmp_path / "out"), engine)


@pytest.mark.slow
def test_four_processes_write_the_same_bytes(people, whole, tmp_path):
    out = tmp_path / "out"
    arguments = command(people, out, "--workers", "4")
    done = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert digests(out) == whole
    assert done.stderr == ""  # nothing of Beam's own


def killed(arguments, out, times, most, seed):
    """Start a program and kill it, ``times`` times, each when it has written 1 to ``most`` files.

    Then let it end; gives how often it was cut off.
    """
    cut, choose = 0, random.Random(seed)

    def written():
        return sum(len(names) for _, _, names in os.walk(out))

    for _ in range(times):
        wanted = written() + choose.randint(1, most)
        process = subprocess.Popen(
            arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and written() < wanted:
            time.sleep(0.002)
        time.sleep(choose.uniform(0.0, 0.02))
        if process.poll() is None:
            cut += not (out / "summary.json").exists()
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended = subprocess.run(arguments, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return cut


def test_killed_and_started_again(people, whole, tmp_path):
    out = tmp_path / "out"
    assert killed(command(people, out), out, 1, 40, seed=1) == 1
    assert digests(out) == whole
    assert not (out / "work").exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "4"])
def test_killed_ten_times(people, whole, tmp_path, workers):
    out = tmp_path / "out"
    assert killed(command(people, out, "--workers", workers), out, 10, 5, seed=2) >= 8
    assert digests(out) == whole


def test_a_second_build_into_one_folder_is_refused_until_the_first_is_dead(
    people, whole, tmp_path, capsys
):
    out, arguments = tmp_path / "out", command(people, tmp_path / "out")[3:]
    out.mkdir()
    hold = (
        "import sys, time; from pathlib import Path; from fact_jax.utils.files import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold, out], stdout=subprocess.PIPE, text=True)
    with first:
        assert first.stdout.readline() == "held\n"
        for more in ([], ["--force"]):
            assert main([*arguments, *more]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"error: another process is writing in {out}" in line
            assert f"process {first.pid}" in line
        first.kill()
    assert main(arguments) == 0
    assert digests(out) == whole
    assert not (out / ".lock").exists()


def test_what_stops_a_pipeline_is_one_line(people, tmp_path, monkeypatch):
    def broken(settings, work, name):
        raise UserError("the model is gone")

    monkeypatch.setattr("fact_train.prepare.build.prepare_chunk", broken)
    engine = Engine(1, ("--direct_num_workers=1",))
    settings = BuildSettings(source=str(people), **OPTIONS)
    with pytest.raises(UserError, match="the model is gone") as caught:
        build(settings, str(tmp_path / "out"), engine)
    assert "\n" not in str(caught.value)


def test_beam_missing_is_one_line(people, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    settings = BuildSettings(source=str(people), **OPTIONS)
    with pytest.raises(UserError, match=r"pip install 'fact-jax\[beam\]'"):
        build(settings, str(tmp_path / "out"), Engine(2))
