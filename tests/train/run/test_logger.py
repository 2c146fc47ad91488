"""What is written about a run."""

import errno
import io
import json
import math
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fact_jax.utils.errors import UserError
from fact_train.run.logger import RunLogger, average, console_line, drop_lines_past, stage

ROW = {"loss": 0.5, "skipped": 0.0, "skipped_in_a_row": 0.0, "steps_per_second": 4.0}


def test_average_leaves_out_what_is_not_finite():
    counters = {"skipped_in_a_row": 0, "learning_rate": 0.1}
    table = [
        {"loss": 1.0, "bad": math.nan, "skipped": 0, **counters},
        {"loss": math.inf, "bad": math.inf, "skipped": 1, **counters},
        {"loss": 4.0, "bad": math.nan, "skipped": 1, **counters, "learning_rate": 0.3},
    ]
    mean = average(table)
    assert mean["loss"] == 2.5
    assert math.isnan(mean["bad"])
    assert mean["skipped"] == 1.0
    assert mean["learning_rate"] == 0.3


def test_console_line():
    values = {"loss": 0.5, "b/x": 2.0, "a": 1e-5, "steps_per_second": 4.0}
    values |= {"skipped": 0.0, "skipped_in_a_row": 0.0}
    line = console_line(10, 1000, values, 247.5)
    assert line == "step 10/1000  loss 0.5  a 1e-05  b/x 2  4.00 steps/s  4 min left"
    line = console_line(10, 1000, values | {"skipped": 3.0, "block/fair/mid.0.0": 1.0}, 50.0)
    assert line == "step 10/1000  loss 0.5  a 1e-05  b/x 2  skipped 3  4.00 steps/s  50 s left"


def test_lines_past_a_step_are_dropped_and_a_broken_one_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_past(path, 3)
    assert not path.exists()
    path.write_text('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 1, "lo')
    drop_lines_past(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'


def test_junk_in_the_metrics_is_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 2}\n3\n[1]\n{"loss": 1}\n{"step": "x"}\n\xff\xfe\n{"step": 3}\n{"st'
    )
    with RunLogger(tmp_path, steps=9) as log:
        log.begin(3, {})
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'
    assert "metrics.jsonl had 5 line(s) that are no metrics" in capsys.readouterr().err


def test_a_terminal_that_is_gone_does_not_end_a_run(tmp_path, monkeypatch):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Gone())
    with RunLogger(tmp_path, steps=9) as log:
        log.say("saved")
    assert (tmp_path / "log.txt").read_text() == "saved\n"


@pytest.mark.parametrize("first", ["log.txt", "metrics.jsonl", "tensorboard"])
def test_where_nothing_more_can_be_written_a_run_ends_in_one_line(first, tmp_path):
    """And does not wait for ever for TensorBoard's records; which file is full first differs."""
    (tmp_path / "log.txt").write_text("-" * 3900 * (first == "log.txt"))
    rest = json.dumps({"step": 0, "rest": "-" * 3900 * (first == "metrics.jsonl")})
    (tmp_path / "metrics.jsonl").write_text(f"{rest}\n")

    def write():
        with RunLogger(tmp_path, steps=9) as log:
            log.begin(0, {})
            log.metrics(1, ROW)
            for _ in range(100):
                log.add(1, {"similarity": 0.5})

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write in .*: File too large; start again"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert first == "tensorboard" or (tmp_path / first).stat().st_size == 4000


def test_weights_and_biases_is_told_the_same(tmp_path, monkeypatch):
    told = []
    library = SimpleNamespace(
        init=lambda **settings: told.append(("init", settings["id"], settings["config"])),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finish"),
        Image=lambda picture: picture.shape,
    )
    monkeypatch.setitem(sys.modules, "wandb", library)
    for start in (0, 5):  # the second time it goes on, on another host
        folder = tmp_path / str(start) / "run"
        with RunLogger(folder, steps=10, wandb=True, name="s3://bucket/run") as log:
            log.begin(start, {"steps": 10})
            log.metrics(start + 5, ROW)
            log.pictures(start + 5, {"grid": np.zeros((2, 3, 3), np.uint8)})
    assert told[0] == told[4] == ("init", told[0][1], {"steps": 10})
    assert told[1:4] == [(5, ROW), (5, {"grid": (2, 3, 3)}), "finish"]
    assert told[5][0] == 10


def test_weights_and_biases_must_be_there_to_be_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        RunLogger(tmp_path, steps=1, wandb=True)


def test_a_stage_is_said_when_it_begins(tmp_path, capsys, monkeypatch):
    now = iter([0.0, 1.0, 10.0, 19.6])
    monkeypatch.setattr("fact_train.run.logger.time.monotonic", lambda: next(now))
    with RunLogger(tmp_path, steps=1) as log:
        with stage(log.say, "loading"):
            assert capsys.readouterr().err == "loading ...\n"
        with stage(log.say, "compiling"):
            pass
    assert capsys.readouterr().err == "compiling ...\ncompiling: 10 s\n"
    assert (tmp_path / "log.txt").read_text() == "loading ...\ncompiling ...\ncompiling: 10 s\n"
