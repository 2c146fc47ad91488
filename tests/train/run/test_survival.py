"""Runs that are killed at random, told to stop, or go on with another number of processes."""

import json
import random
import re
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from fact_train.config import load_config
from fact_train.overrides import override
from fact_train.run.loop import run
from tests.train.conftest import TOY
from tests.train.multihost.test_processes import finish, free_address, start
from tests.train.run.test_loop import rows, start_program, wait_for_step
from tests.train.toy import assert_same

pytestmark = pytest.mark.slow
KILLS = 20


def test_killed_twenty_times_is_uninterrupted(tmp_path):
    # Large enough that a checkpoint is being written most of the time.
    settings = ["steps=420", "options.width=20000", "checkpoint.every=3", "log.every=1"]
    folder = tmp_path / "killed"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    moments, torn = sorted(chance.sample(range(5, 400), KILLS)), 0
    for moment in moments:
        program = start_program(TOY, folder, *settings)
        wait_for_step(folder, moment, program)
        time.sleep(chance.uniform(0.0, 0.1))
        program.kill()
        assert program.wait() == -signal.SIGKILL, f"over before it was killed, seed {seed}"
        program.stderr.close()
        torn += any((folder / "checkpoints").glob("*tmp*"))
    print(f"seed {seed}: killed at {moments}, {torn} times while a checkpoint was being written")
    assert torn > 0
    program = start_program(TOY, folder, *settings)
    _, errors = program.communicate(timeout=600)
    assert program.returncode == 0, errors
    config = override(load_config(TOY)[1], settings)
    ends = [run(config, path).state for path in (folder, tmp_path / "reference")]
    assert int(ends[0].step) == 420
    assert_same(*ends)
    exports = [load_file(path / "export" / "toy.safetensors") for path in tmp_path.iterdir()]
    assert_same(*exports)
    assert [row["step"] for row in rows(folder)] == list(range(1, 421))


def train(folder, processes, *settings, devices=1):
    """Start the toy on so many processes."""
    command = ["-m", "fact_train", "run", str(TOY), "--out", str(folder), *settings]
    if processes == 1:
        return [start(*command, devices=devices)]
    place = ["--coordinator", free_address(), "--processes", str(processes)]
    return [
        start(*command, *place, "--process", str(process), devices=devices)
        for process in range(processes)
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(load_config(TOY)[1], folder)
    return folder


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((2, ["mesh.fsdp=2"], 2), (1, [], 1)),
        ((1, [], 1), (4, ["mesh.fsdp=4"], 1)),
    ],
    ids=["from 2 processes to 1", "from 1 process to 4"],
)
def test_going_on_with_another_number_of_processes(first, then, alone, tmp_path):
    folder = tmp_path / "run"
    for (processes, settings, devices), steps in ((first, 30), (then, 60)):
        ends = finish(
            train(folder, processes, *settings, f"steps={steps}", devices=devices), limit=600
        )
        assert [status for status, _, _ in ends] == [0] * processes, ends
    assert "resuming at step 30" in ends[0][2]
    assert "warning" not in ends[0][2]
    meta = json.loads((folder / "checkpoints/00000060/meta/metadata").read_text())
    assert meta["processes"] == then[0]
    losses = [[row["loss"] for row in rows(path) if row["step"] > 30] for path in (folder, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    ends = [load_file(path / "export" / "toy.safetensors") for path in (folder, alone)]
    for name, array in ends[1].items():
        np.testing.assert_allclose(ends[0][name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    folder = tmp_path / "run"
    programs = train(folder, 2, "steps=1000000", "checkpoint.every=1000000", "log.every=5")
    wait_for_step(folder, 20, programs[0], limit=600)
    programs[1].terminate()
    ends = finish(programs, limit=300)
    assert [status for status, _, _ in ends] == [143, 143], ends
    (saved,) = (folder / "checkpoints").iterdir()
    assert int(saved.name) >= 20
    assert f"stopped at step {int(saved.name)}" in ends[0][2]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_other_in_one_line(victim, tmp_path):
    folder = tmp_path / "run"
    programs = train(folder, 2, "steps=1000000", "checkpoint.every=50", "log.every=5")
    wait_for_step(folder, 20, programs[0], limit=600)
    programs[victim].kill()
    killed = time.monotonic()
    ends = finish(programs, limit=60)
    assert time.monotonic() - killed < 20
    status, _, errors = ends[1 - victim]
    assert status == 2, errors
    assert re.search(rf"error: process {victim} of 2 .* is gone: .* newest checkpoint\n", errors)
    assert "Traceback" not in errors
    (end,) = finish(train(folder, 1, "steps=60"))
    assert end[0] == 0, end
