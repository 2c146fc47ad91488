"""A run in its folder: what it leaves there, and that stopping it changes nothing."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file

from fact_jax.utils.errors import UserError
from fact_train.config import CheckpointConfig
from fact_train.engine.prefetch import prefetch
from fact_train.overrides import override
from fact_train.run.checkpoints import Checkpoints
from fact_train.run.loop import run
from tests.train.toy import ToyTask, assert_same

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def start_program(toy_file, folder, *overrides):
    command = [
        sys.executable,
        "-m",
        "fact_train",
        "run",
        str(toy_file),
        "--out",
        str(folder),
    ]
    return subprocess.Popen(
        [*command, *overrides],
        cwd=folder.parent,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_step(folder, step, program, limit=120):
    """Until the metrics of a step at or past ``step`` stand in the folder."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        assert program.poll() is None, program.stderr.read()
        path = folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        complete = text[: text.rfind("\n") + 1].splitlines()
        if complete and json.loads(complete[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} did not come within {limit} s")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, outcome) of the toy experiment run through."""
    from fact_train.config import load_config
    from tests.train.conftest import TOY

    folder = tmp_path_factory.mktemp("toy") / "run"
    config = override(load_config(TOY)[1], ["log.samples_every=40"])
    return folder, run(config, folder, "fact-train run toy")


def test_no_samples_if_none_are_wanted(tmp_path):
    from fact_train.config import load_config
    from tests.train.conftest import TOY

    run(override(load_config(TOY)[1], ["log.samples_every=none", "steps=3"]), tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 3]
    assert not (tmp_path / "run" / "samples").exists()


def test_what_a_run_leaves(finished):
    folder, outcome = finished
    assert int(outcome.state.step) == 60
    assert outcome.stopped_by is None
    assert [row["step"] for row in rows(folder)] == [1, 10, 20, 30, 40, 50, 60]
    assert rows(folder)[-1]["loss"] < 0.2 * rows(folder)[0]["loss"]
    assert rows(folder)[-1]["loss/mse"] == rows(folder)[-1]["loss"]
    saved = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert saved == ["00000049", "00000056", "00000060"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "grid-00000040.png",
        "grid-00000060.png",
    ]
    first, last = (Image.open(folder / "samples" / f"grid-{n:08d}.png") for n in (40, 60))
    assert last.size == (6, 4)
    np.testing.assert_array_equal(first, last)  # the toy draws from the key alone, which is fixed
    exported = load_file(folder / "export" / "toy.safetensors")
    np.testing.assert_array_equal(exported["gate"], outcome.state.ema["gate"])
    assert json.loads((folder / "export" / "training.json").read_text())["step"] == 60
    assert "fact-train run toy" in (folder / "log.txt").read_text().splitlines()[0]
    assert list((folder / "tensorboard").iterdir())


def test_frozen_is_untouched_and_statistics_count_every_step(finished):
    _, outcome = finished
    np.testing.assert_array_equal(outcome.frozen["shift"], np.float32([0.5]))
    np.testing.assert_array_equal(outcome.state.params["count"], [60.0])


def test_resumed_is_uninterrupted(finished, toy_config, tmp_path):
    # The first part ends between two checkpoints and two log lines, with other settings of both.
    folder = tmp_path / "run"
    run(override(toy_config, ["steps=33", "checkpoint.every=5", "log.every=4"]), folder)
    outcome = run(toy_config, folder)
    assert_same(outcome.state, finished[1].state)
    steps = [row["step"] for row in rows(folder)]
    assert steps == [1, *range(4, 33, 4), 33, 40, 50, 60]


def test_a_finished_run_started_again_only_mends_its_export(
    finished, toy_config, monkeypatch, capsys
):
    folder, before = finished
    metrics = rows(folder)
    shutil.rmtree(folder / "export")  # as if killed right after the last checkpoint
    monkeypatch.setattr("fact_train.run.checkpoints.versions", lambda: {"jax": "0.0"})
    assert_same(run(toy_config, folder).state, before.state)
    assert load_file(folder / "export" / "toy.safetensors")
    assert rows(folder) == metrics
    assert "warning: jax changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("toy.safetensors", None, "toy.safetensors not as written"),
        ("training.json", b"[", "training.json cannot be read"),
        ("training.json", b"3", "training.json cannot be read"),
        ("training.json", b'{"step": 60}', "training.json does not say what was written"),
    ],
)
def test_a_damaged_export_is_written_again_from_the_checkpoint(
    name, content, why, finished, toy_config, capsys
):
    path = finished[0] / "export" / name
    path.write_bytes(path.read_bytes()[:40] if content is None else content)
    # What somebody put there stays, as an encoder beside its adapter.
    others = [path.with_name("notes.txt"), path.with_name("encoder") / "config.json"]
    for other in others:
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    run(toy_config, finished[0])
    assert [other.read_text() for other in others] == ["mine", "mine"]
    assert f"export: {why}; written again from checkpoint 60" in capsys.readouterr().err
    assert load_file(finished[0] / "export" / "toy.safetensors")["gate"].shape == ()
    run(toy_config, finished[0])
    assert "export:" not in capsys.readouterr().err


def test_another_configuration_is_refused_with_its_keys(finished, toy_config):
    folder, _ = finished
    other = override(toy_config, ["seed=4", "options.width=8", "log.every=1", "steps=61"])
    with pytest.raises(UserError) as caught:
        run(other, folder)
    message = str(caught.value)
    assert "options.width 16 -> 8; seed 3 -> 4" in message
    assert "log.every" not in message
    assert "steps" not in message


def test_ten_bad_steps_in_a_row_end_the_run(toy_config, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="not finite 10 times in a row, up to step 24"):
        run(override(toy_config, ["options.poison=(14,60)"]), folder)
    saved = {path.name for path in (folder / "checkpoints").iterdir()}
    assert "00000014" in saved


def test_nine_bad_steps_are_only_counted(toy_config, tmp_path):
    outcome = run(override(toy_config, ["options.poison=(3,12)", "steps=20"]), tmp_path / "run")
    assert int(outcome.state.skipped) == 9
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 7, 9]
    assert all(row["loss"] is not None for row in rows(tmp_path / "run"))


def test_a_run_that_ends_on_skipped_steps_is_not_done(toy_config, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.raises(UserError, match="2 times in a row, up to step 16") as caught:
        run(override(toy_config, ["options.poison=(14,16)", "steps=16"]), folder)
    assert "checkpoint 14" in str(caught.value)
    assert not (folder / "checkpoints" / "00000016").exists()
    assert json.loads((folder / "export" / "training.json").read_text())["step"] == 14
    assert "done" not in capsys.readouterr().err


def test_no_checkpoint_is_written_within_skipped_steps(toy_config, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    config = override(toy_config, ["options.poison=(12,15)", "steps=21"])
    run(config, folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"00000007", "00000021"}
    assert "no checkpoint at step 14: the last 2 updates were skipped" in capsys.readouterr().err

    def decide(self, failure):
        self.seen = getattr(self, "seen", 0) + 1
        self.decided = signal.SIGTERM if self.seen == 13 else None
        return self.seen == 13

    monkeypatch.setattr("fact_train.run.loop.SignalHandler.decide", decide)
    outcome = run(config, tmp_path / "stopped")
    assert outcome.stopped_by == signal.SIGTERM
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["00000007"]
    assert "nothing was saved" in capsys.readouterr().err


@pytest.mark.parametrize("decay", [("0", "0.9"), ("0.9", "0")])
def test_rates_averages_and_batch_may_change_on_the_way(decay, toy_config, tmp_path, capsys):
    folder = tmp_path / "run"
    first = override(toy_config, ["steps=7", f"ema.decay={decay[0]}"])
    before = run(first, folder).state.params
    settings = ["optimizer.learning_rate=1e-30", "optimizer.warmup_steps=2", "batch_size=16"]
    settings += ["log.every=2", "steps=9", f"ema.decay={decay[1]}"]
    after = run(override(toy_config, settings), folder).state
    said = capsys.readouterr().err
    for line in (
        "optimizer.learning_rate 0.01 -> 1e-30 from step 7 on",
        "optimizer.warmup_steps 5 -> 2 from step 7 on",
        f"ema.decay {float(decay[0])} -> {float(decay[1])} from step 7 on",
        "batch_size 8 -> 16 from step 7 on",
        "log.every 10 -> 2 from step 7 on",
    ):
        assert line in said.splitlines()
    assert "warning" not in said
    assert_same(before["layers"], after.params["layers"])
    assert int(after.step) == 9
    if decay[1] == "0":
        assert after.ema is None
    else:
        assert_same(after.ema["layers"], before["layers"])


class Watched(ToyTask):
    """Has a number to watch, and may fail at it."""

    score = "validation/count"

    def samples(self, trainable, frozen, key):
        count = float(trainable["count"][0])
        if count < 14:  # the running average of a count
            raise MemoryError("no room for pictures\nat all")
        return {"validation/count": count} | super().samples(trainable, frozen, key)


def test_pictures_come_after_the_checkpoint_and_may_fail(toy_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fact_train.run.prepare.make_task", Watched)
    folder = tmp_path / "run"
    settings = ["steps=21", "log.samples_every=7", "ema.decay=0", "checkpoint.best=1"]
    seen = []

    def rate(self, step, score):
        assert step in self.steps()
        assert rows(folder)[-1]["step"] == step
        seen.append((step, score))
        original(self, step, score)

    original = Checkpoints.rate
    monkeypatch.setattr(Checkpoints, "rate", rate)
    run(override(toy_config, settings), folder)
    assert seen == [(7, None), (14, 14.0), (21, 21.0)]
    failed = "warning: no sample pictures of step 7 (MemoryError: no room for pictures); "
    assert failed + "the training goes on" in capsys.readouterr().err
    counts = [row.get("validation/count") for row in rows(folder)]
    assert counts == [None, None, None, 14.0, None, 21.0]
    assert [row["step"] for row in rows(folder)] == [1, 7, 10, 14, 20, 21]
    assert all("loss" in row for row in rows(folder))
    # What was seen is still known when the run goes on.
    monkeypatch.setattr(Watched, "samples", lambda *arguments: {"validation/count": 0.0})
    run(override(toy_config, [*settings, "steps=49", "checkpoint.keep=1"]), folder)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"00000021", "00000049"}


def test_what_is_watched_is_opened_before_the_first_step(toy_config, tmp_path, monkeypatch):
    class Missing(ToyTask):
        def open_samples(self):
            raise UserError("no records in /nowhere")

    monkeypatch.setattr("fact_train.run.prepare.make_task", Missing)
    with pytest.raises(UserError, match="no records in /nowhere"):
        run(toy_config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    settings = ["steps=1", "log.samples_every=none"]
    run(override(toy_config, settings), tmp_path / "run")  # nothing is watched


def damage_flip(folder):
    # What is read; Orbax leaves each process's own part beside it, as large.
    largest = max((folder / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)


def damage_truncate(folder):
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_exchange(folder):
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("00000007"), folder)


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_exchange])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    damage, toy_config, finished, tmp_path, capsys
):
    folder = tmp_path / "run"
    run(override(toy_config, ["steps=21"]), folder)
    damage(folder / "checkpoints" / "00000021")
    outcome = run(toy_config, folder)
    errors = capsys.readouterr().err
    assert "warning: checkpoint 21 cannot be read" in errors
    assert "resuming at step 14" in errors
    assert_same(outcome.state, finished[1].state)
    assert (folder / "checkpoints-unreadable" / "00000021").is_dir()


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(toy_config, tmp_path):
    config = dataclasses.replace(toy_config, steps=5, checkpoint=CheckpointConfig(every=9))
    run(config, tmp_path / "run")
    damage_truncate(tmp_path / "run" / "checkpoints" / "00000005")
    with pytest.raises(UserError, match="none of the checkpoints in"):
        run(config, tmp_path / "run")


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_at_any_moment_is_uninterrupted(kills, toy_file, toy_config, tmp_path):
    settings = ["steps=120", "checkpoint.every=11", "log.every=1"]
    config, folder = override(toy_config, settings), tmp_path / "killed"
    chance = random.Random()
    moments = sorted(chance.sample(range(5, 105), kills))
    for moment in moments:
        program = start_program(toy_file, folder, *settings)
        wait_for_step(folder, moment, program)
        time.sleep(chance.uniform(0.0, 0.05))
        program.kill()
        assert program.wait() == -signal.SIGKILL, f"over before it was killed, moments {moments}"
        program.stderr.close()
    ends = [run(config, path).state for path in (folder, tmp_path / "reference")]
    assert int(ends[0].step) == 120
    assert_same(*ends)
    exports = [load_file(path / "export" / "toy.safetensors") for path in tmp_path.iterdir()]
    assert_same(*exports)
    assert [row["step"] for row in rows(folder)] == list(range(1, 121))


def test_sigterm_saves_and_exits_with_143(toy_file, tmp_path):
    folder = tmp_path / "run"
    program = start_program(toy_file, folder, "steps=100000", "checkpoint.every=100000")
    wait_for_step(folder, 20, program)
    program.terminate()
    _, errors = program.communicate(timeout=60)
    assert program.returncode == 143, errors
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.name) >= 20
    assert json.loads((folder / "export" / "training.json").read_text())["step"] == int(saved.name)


def test_a_signal_does_not_end_the_last_checkpoint(toy_config, tmp_path, monkeypatch):
    manager = ocp.CheckpointManager
    save, wait = manager.save, manager.wait_until_finished

    def then_interrupted(*arguments, **settings):
        save(*arguments, **settings)
        monkeypatch.setattr(manager, "wait_until_finished", interrupted)

    def interrupted(self):
        monkeypatch.setattr(manager, "wait_until_finished", wait)
        signal.raise_signal(signal.SIGINT)
        wait(self)

    monkeypatch.setattr(manager, "save", then_interrupted)
    outcome = run(override(toy_config, ["steps=2", "log.samples_every=none"]), tmp_path)
    assert outcome.stopped_by is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000002"]


def test_an_error_in_the_data_reaches_the_caller():
    def broken():
        yield {"x": np.zeros(1)}
        yield {"x": np.zeros(1)}
        raise OSError("disk gone")

    with prefetch(broken(), jax.device_put, 0, 5) as batches:
        assert [next(batches)[0], next(batches)[0]] == [1, 2]
        with pytest.raises(OSError, match="disk gone"):
            next(batches)
