"""What is written about a run."""

import math

from train.runlog import average, console_line, drop_lines_past


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
    line = console_line(10, 1000, values | {"skipped": 3.0}, 50.0)
    assert line == "step 10/1000  loss 0.5  a 1e-05  b/x 2  skipped 3  4.00 steps/s  50 s left"


def test_lines_past_a_step_are_dropped_and_a_broken_one_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_past(path, 3)
    assert not path.exists()
    path.write_text('{"step": 2}\n{"step": 3}\n{"step": 4}\n{"step": 1, "lo')
    drop_lines_past(path, 3)
    assert path.read_text() == '{"step": 2}\n{"step": 3}\n'
