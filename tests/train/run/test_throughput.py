"""Speeds by a clock that the test turns."""

import json
from types import SimpleNamespace

import jax
import pytest

from fact_jax.plan.chips import CHIPS
from fact_train.overrides import override
from fact_train.run.loop import run
from fact_train.run.throughput import ProfilerTrace, ThroughputMeter


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("fact_train.run.throughput.time.monotonic", lambda: clock.now)
    return clock


def pretend(monkeypatch, kind, count):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(jax, "device_count", lambda: count)


def slow_batches(clock):
    for _ in range(4):
        clock.now += 0.5  # until there is a batch
        yield "batch"


def train(meter, clock):
    """Four steps of 2 s, half a second of waiting for each, and 30 s of something else."""
    meter.begin(197e12, 2 * 197e12)
    for _ in meter.waits(slow_batches(clock)):
        clock.now += 2.0
        meter.step()
    with meter.paused():
        clock.now += 30.0
    return meter.row()


def test_speeds_on_a_known_chip(clock, monkeypatch):
    pretend(monkeypatch, "TPU v5 lite", 4)
    row = train(ThroughputMeter(batch_size=32), clock)
    assert row["steps_per_second"] == pytest.approx(4 / 10)
    assert row["speed/samples_per_second_per_chip"] == pytest.approx(4 * 32 / 10 / 4)
    assert row["speed/data_wait"] == pytest.approx(0.2)
    # A step is one second's work of one chip at its peak; four chips take 2.5 s for it.
    assert row["speed/mfu"] == pytest.approx(1 / 4 / 2.5)
    # As much again is recomputed.
    assert row["speed/step_seconds"] == pytest.approx(2.5)
    assert row["speed/arithmetic_seconds"] == pytest.approx(2 / 4)


def test_two_devices_of_a_chip_are_one_chip(clock, monkeypatch):
    pretend(monkeypatch, "TPU7x", 4)
    row = train(ThroughputMeter(batch_size=32), clock)
    assert row["speed/samples_per_second_per_chip"] == pytest.approx(4 * 32 / 10 / 2)


def test_no_utilisation_where_no_peak_is_known(clock, monkeypatch):
    pretend(monkeypatch, "cpu", 1)
    assert "speed/mfu" not in train(ThroughputMeter(batch_size=32), clock)


def test_a_row_begins_where_the_last_one_ended(clock, monkeypatch):
    pretend(monkeypatch, "cpu", 1)
    meter = ThroughputMeter(batch_size=1)
    train(meter, clock)
    meter.step()
    clock.now += 5.0
    row = meter.row()
    assert row["steps_per_second"] == pytest.approx(0.2)
    assert row["speed/data_wait"] == 0


@pytest.mark.heavy
def test_a_run_on_a_known_chip_tells_its_utilisation(toy_config, tmp_path, monkeypatch):
    """Operations by hand: two layers forward, both again for their own kernels, one for inputs."""
    monkeypatch.setattr("fact_train.run.throughput.chip_of", lambda kind: CHIPS["h100"])
    run(override(toy_config, ["steps=3", "log.every=1"]), tmp_path / "run")
    batch, width = 8, 16
    flops = 2 * batch * width * (2 + 2 + 1)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        expected = row["steps_per_second"] * flops / CHIPS["h100"].peak / jax.device_count()
        assert row["speed/mfu"] == pytest.approx(expected, rel=1e-6)
        assert row["speed/step_seconds"] == pytest.approx(1 / row["steps_per_second"])
        at_peak = flops / CHIPS["h100"].peak / jax.device_count()  # nothing is recomputed
        assert row["speed/arithmetic_seconds"] == pytest.approx(at_peak)


def test_a_profile_of_some_steps(tmp_path):
    profile = ProfilerTrace(tmp_path / "profile", (2, 3))
    wrote = []
    for step in range(1, 6):
        profile.before(step)
        wrote.append(profile.after(step, jax.numpy.zeros(()), last=False))
    assert wrote == [False, False, True, False, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    never = ProfilerTrace(tmp_path / "never", (0, 0))
    never.before(1)
    assert not never.after(1, None, last=True)
    assert not (tmp_path / "never").exists()
