"""Checkpoints: which ones stay, what they are checked against, and what happens without room."""

import collections
import errno
import json
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.utils import errors
from fact_jax.utils.errors import UserError, run_program
from fact_train.cli.main import main
from fact_train.engine.checksums import checksums, content_hash
from fact_train.multihost.collectives import process_max
from fact_train.overrides import override
from fact_train.run.checkpoints import CheckpointRetention
from fact_train.run.loop import run
from fact_train.run.provenance import revision
from fact_train.run.signal_handler import SignalHandler
from tests.train.toy import ToyTask

pytestmark = pytest.mark.heavy


def kept(keep, steps):
    """What stays when checkpoints are written one after the other."""
    held = []
    for step in steps:
        held = [SimpleNamespace(step=n) for n in [*held, step]]
        stays = keep.should_preserve(held, context=None)
        held = [info.step for info, yes in zip(held, stays, strict=True) if yes]
    return held


def test_the_latest_stay():
    assert kept(CheckpointRetention(latest=2), range(10, 70, 10)) == [50, 60]


def test_every_so_many_steps_stay():
    assert kept(CheckpointRetention(latest=1, every=20), range(10, 80, 10)) == [20, 40, 60, 70]


def test_the_best_stay_and_what_has_no_score_is_none_of_them():
    keep = CheckpointRetention(latest=1, best=2)
    for step, score in ((10, 0.3), (20, 0.9), (30, None), (40, 0.5), (50, 0.1)):
        keep.score(step, score)
    assert kept(keep, range(10, 60, 10)) == [20, 40, 50]
    assert kept(CheckpointRetention(latest=1, best=2), range(10, 60, 10)) == [50]


def test_a_run_keeps_its_best_by_loss_across_a_restart(toy_config, tmp_path):
    settings = ["checkpoint.every=10", "checkpoint.keep=1", "checkpoint.best=1"]
    settings += ["optimizer.learning_rate=0.3"]  # which makes the loss jump up and down
    config = override(toy_config, settings)
    for steps in (50, 60):
        run(override(config, [f"steps={steps}"]), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    # Rows and checkpoints come together: a row's loss is the mean since the checkpoint before.
    losses = {row["step"]: row["loss"] for row in rows if row["step"] > 10}
    best = min(losses, key=losses.get)
    assert best < 60
    saved = [int(folder.name) for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert sorted(saved) == [best, 60]


def test_checksums_by_hand():
    tree = {"a": jnp.asarray([[1, 2], [3, 4]], jnp.int32), "b": jnp.asarray(7, jnp.uint8)}
    assert checksums(tree) == {"a": 1 + 2 * 3 + 3 * 5 + 4 * 7, "b": 7}
    assert checksums({"c": jnp.asarray([0.0, 1.0], jnp.bfloat16)}) == {"c": 0x3F80 * 3}


def test_the_content_hash_sees_values_names_types_and_places():
    trees = [
        {"a": jnp.asarray([1.0, 2.0])},
        {"a": jnp.asarray([2.0, 1.0])},
        {"b": jnp.asarray([1.0, 2.0])},
        {"a": jnp.asarray([[1.0, 2.0]])},
        {"a": jnp.asarray([1.0, 2.0]).view(jnp.int32)},
    ]
    assert len({content_hash(tree) for tree in trees}) == 5
    assert content_hash(trees[0]) == content_hash({"a": np.float32([1.0, 2.0])})


def test_another_base_is_refused(toy_config, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(override(toy_config, ["steps=7"]), folder)
    before = sorted((folder / "checkpoints").iterdir())

    class OtherBase(ToyTask):
        def init(self, key):
            return super().init(key)[0], {"shift": np.full((1,), 0.25, np.float32)}

    monkeypatch.setattr("fact_train.run.prepare.make_task", OtherBase)
    with pytest.raises(UserError, match="trained on another frozen base") as caught:
        run(toy_config, folder)
    assert "\n" not in str(caught.value)
    assert sorted((folder / "checkpoints").iterdir()) == before


def test_what_a_checkpoint_says_of_itself(toy_config, tmp_path):
    outcome = run(override(toy_config, ["steps=5"]), tmp_path / "run")
    meta = json.loads((tmp_path / "run/checkpoints/00000005/meta/metadata").read_text())
    assert meta["config"]["options.width"] == 16
    assert meta["frozen"] == content_hash(outcome.frozen)
    assert meta["revision"] == revision()
    assert meta["versions"]["jax"] == jax.__version__
    about = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert about["revision"] == revision()
    assert about["versions"] == meta["versions"]
    assert about["devices"]["count"] == jax.device_count()


def test_changed_data_is_said(toy_config, tmp_path, monkeypatch, capsys):
    run(override(toy_config, ["steps=5"]), tmp_path / "run")

    class OtherData(ToyTask):
        def source(self):
            source = super().source()
            source.fingerprint = "other"
            return source

    monkeypatch.setattr("fact_train.run.prepare.make_task", OtherData)
    run(override(toy_config, ["steps=6"]), tmp_path / "run")
    assert "warning: the training data changed since" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_before_it_goes_on(toy_config, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    room = iter([10**9, 10])
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, next(room)))
    with pytest.raises(UserError, match="no room for the checkpoint of step 14"):
        run(toy_config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["00000007"]


def test_a_disk_that_is_full_for_other_files_is_one_line(
    toy_config, toy_file, tmp_path, monkeypatch, capsys
):
    class NoRoom(ToyTask):
        def export(self, trainable, frozen, directory, step):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fact_train.run.prepare.make_task", NoRoom)
    with pytest.raises(UserError, match=r"export of step 7: No space left on device"):
        run(toy_config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "00000007" / "meta").is_dir()

    def full(self, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fact_train.run.logger.RunLogger.note", full)
    assert main(["run", str(toy_file), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: No space left on device")


def test_what_cannot_be_written_in_the_background_ends_the_run(toy_file, tmp_path):
    """The limit on the size of a file stands for a disk that fills up while it is written.

    Orbax puts as many arrays into one file as are ready together: which of the checkpoints is the
    first to have a larger one is a matter of timing.
    """

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))

    settings = ["options.width=20000", "steps=100000", "checkpoint.every=5", "log.every=1000"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fact_train",
            "run",
            str(toy_file),
            "--out",
            "run",
            *settings,
        ],
        cwd=tmp_path,
        preexec_fn=limit,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert re.search(r"error: the checkpoint of step \d+ could not be written", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_heard_after_the_step(number, capfd):
    before = signal.getsignal(number)
    with SignalHandler() as stopping:
        assert not stopping.decide(None)
        signal.raise_signal(number)
        assert stopping.decide(None)
    assert stopping.decided == number
    assert signal.getsignal(number) == before
    assert "saving a checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_program_is_not_ended_before_its_checkpoint(number):
    """Whoever watches for signals that Python loses finds this one taken care of."""

    def save():
        with SignalHandler() as stopping:
            signal.raise_signal(number)
            time.sleep(0.3)
            return int(stopping.decide(None))

    assert run_program(save) == 1


def test_a_second_signal_acts_at_once(monkeypatch):
    monkeypatch.setattr(errors, "_leave_at_once", lambda status: None)

    def save():
        with SignalHandler():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(60)

    assert run_program(save) == 128 + signal.SIGTERM


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with SignalHandler() as stopping:
            signal.raise_signal(signal.SIGHUP)
            assert not stopping.decide(None)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_failed_checkpoint_is_told_to_all():
    with SignalHandler() as stopping, pytest.raises(UserError, match="disk"):
        stopping.decide(UserError("disk"))


def test_alone_the_largest_is_ones_own():
    assert int(process_max(15)) == 15
