"""Real processes that meet on loopback: they train as one does, and fail together."""

import json
import os
import signal
import socket
import subprocess
import sys
import unittest.mock
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fact_jax.utils.errors import UserError
from fact_train.multihost.processes import initialize
from fact_train.overrides import override
from fact_train.run.loop import run

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[3]
EXPERIMENT = Path(__file__).parents[1] / "random_rows.py"


def free_address():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{opened.getsockname()[1]}"


def start(*arguments, devices=1, cwd=ROOT, **variables):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(programs, limit=600):
    """(status, output, errors) of each."""
    try:
        ends = [program.communicate(timeout=limit) for program in programs]
    finally:
        for program in programs:
            program.kill()
    return [(program.returncode, *texts) for program, texts in zip(programs, ends, strict=True)]


def exported(out):
    """(rows of the metrics, exported arrays) of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (weights,) = (out / "export").glob("*.safetensors")
    return rows, load_file(weights)


def srun(processes, process, port):
    """What srun tells a task of a step on one host; JAX would make the port of the job's number."""
    return {
        "JAX_COORDINATOR_PORT": port,
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(processes),
        "SLURM_STEP_TASKS_PER_NODE": str(processes),
        "SLURM_NODEID": "0",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }


def mpirun(processes, process, port):
    """The same of Open MPI 5, which names the host and process number of mpirun."""
    return {
        "JAX_COORDINATOR_PORT": port,
        "PMIX_NAMESPACE": f"prterun-{socket.gethostname()}-12345@1",
        "OMPI_COMM_WORLD_SIZE": str(processes),
        "OMPI_COMM_WORLD_RANK": str(process),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(processes),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(process),
    }


def train(out, processes, experiment, *settings, devices=1):
    """Train by the program itself on so many processes: the errors of each, and the above."""
    command = ["-m", "fact_train", "run", str(experiment), "--out", str(out), *settings]
    command += ["--coordinator", "auto"]
    port = free_address().rpartition(":")[2]
    variables = [srun(processes, process, port) for process in range(processes)]
    ends = finish([start(*command, devices=devices, **more) for more in variables])
    assert [status for status, _, _ in ends] == [0] * processes, ends
    return [errors for _, _, errors in ends], *exported(out)


def assert_the_same_training(ours, alone):
    (rows, weights), (rows_alone, weights_alone) = ours, alone
    assert [row["step"] for row in rows] == [row["step"] for row in rows_alone]
    for name in rows_alone[0].keys() & {"loss", "loss/mse", "loss/fair", "gradient_norm"}:
        curves = [[row[name] for row in both] for both in (rows, rows_alone)]
        np.testing.assert_allclose(*curves, rtol=1e-5, atol=1e-7, err_msg=name)
    assert len({row["loss"] for row in rows}) == len(rows)
    assert weights.keys() == weights_alone.keys()
    for name, one in weights_alone.items():
        scale = np.abs(one).max()
        np.testing.assert_allclose(weights[name], one, atol=1e-5 * scale, rtol=0, err_msg=name)


def test_two_processes_train_as_one(toy_file, toy_config, tmp_path):
    settings = ["steps=6", "log.every=1", "optimizer.learning_rate=1", "optimizer.eps=1"]
    run(override(toy_config, settings), tmp_path / "alone")
    errors, *ours = train(tmp_path / "together", 2, toy_file, *settings, devices=2)
    assert_the_same_training(ours, exported(tmp_path / "alone"))
    assert "step 6/6" in errors[0]
    assert "step" not in errors[1]  # process 0 alone tells of it


@pytest.mark.slow
def test_processes_train_the_adapter_as_one(miniature, tmp_path):
    given = [EXPERIMENT, *(f"options.{part}={miniature / part}" for part in ("base", "encoder"))]
    _, *alone = train(tmp_path / "alone", 1, *given)
    for processes, devices, split in ((2, 2, 1), (4, 1, 1), (4, 1, 4)):
        out = tmp_path / f"{processes}-{split}"
        _, *ours = train(out, processes, *given, f"mesh.fsdp={split}", devices=devices)
        assert_the_same_training(ours, alone)


MEET = """
import dataclasses, os, signal, sys
from pathlib import Path
from fact_jax.utils.errors import UserError
from fact_train.multihost.collectives import process_all
from fact_train.config import TrainConfig
from fact_train.multihost.processes import check_alike, check_same, check_shared
from fact_train.multihost.collectives import process_broadcast, raise_on_all_processes
from fact_train.multihost.processes import initialize
import fact_train.multihost.processes, fact_train.run.prepare
from fact_jax.sharding import make_mesh
from tests.train.toy import ToyTask, config as toy
from fact_train.multihost.heartbeat import PeerMonitor
process, folder = int(sys.argv[2]), Path(sys.argv[3])
initialize(sys.argv[1], 2, process)
config = TrainConfig(task="toy", steps=1, batch_size=2, options=None)
check_alike(config)
check_same({"base": "abc"}, "give it")
assert process_broadcast(bytes(range(process, 250)) * 9) == bytes(range(250)) * 9
class OtherBase(ToyTask):
    def init(self, key):
        trainable, frozen = super().init(key)
        return trainable, {"shift": frozen["shift"] + process}
fact_train.run.prepare.make_task = OtherBase
check_shared(folder / "shared" / "run")
fact_train.multihost.processes._VISIBLE_SECONDS = 0.2
for attempt in (
    lambda: check_alike(dataclasses.replace(config, seed=process)),
    lambda: check_same({"base": "abc", "data": f"data-{process}"}, "give the same"),
    lambda: check_shared(folder / f"of-{process}"),
    lambda: fact_train.run.prepare.prepare(toy, make_mesh(toy.mesh), str, "run"),
    None,
):
    try:
        with raise_on_all_processes():
            if attempt:
                attempt()
            elif process == 1:
                raise UserError("no records in /data")
    except UserError as error:
        print(error)
with PeerMonitor():
    if process == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    process_all(True)
"""


def test_what_one_process_lacks_is_told_by_all(tmp_path):
    address = free_address()
    ends = finish([start("-c", MEET, address, str(process), str(tmp_path)) for process in (0, 1)])
    # And the last of them is killed, which the other says at once.
    assert [status for status, _, _ in ends] == [2, -signal.SIGKILL], ends
    (error,) = [line for line in ends[0][2].splitlines() if line.startswith("error: ")]
    assert error.startswith("error: process 1 of 2")
    assert "is gone" in error
    assert "Traceback" not in ends[0][2]
    said = [
        [line for line in output.splitlines() if not line.startswith("[Gloo]")]
        for _, output, _ in ends
    ]
    differs = "process 1 of 2 was given other settings than process 0"
    host = socket.gethostname()
    other = f"process 1 ({host}, data-1) of 2 has another data than process 0 ({host}, data-0)"
    unseen = f"process 1 ({host}, {tmp_path / 'of-1'}) of 2 does not see the folder that process 0"
    for lines, last in zip(said, ("process 1 of 2: no records", "no records"), strict=True):
        assert [lines[0], lines[4]] == [differs, f"{last} in /data"]
        assert lines[1] == f"{other}: give the same"
        assert lines[2].startswith(unseen)
        assert lines[3].startswith(f"process 1 ({host}, ")
        assert "of 2 has another frozen base than process 0" in lines[3]
    assert [path.name for path in (tmp_path / "shared").rglob("*")] == ["run"]


WHO = """
import jax
from fact_train.multihost.processes import initialize
from fact_train.multihost.collectives import process_gather
initialize("auto", None, None)
print(*process_gather(f"{jax.process_index()} of {jax.process_count()}"), sep=", ")
"""


def test_processes_of_mpirun_find_each_other():
    """And one that nobody started is alone."""
    port = free_address().rpartition(":")[2]
    variables = [mpirun(2, process, port) for process in (0, 1)]
    ends = finish([start("-c", WHO, **more) for more in [*variables, {}]])
    said = [output.splitlines()[-1:] for _, output, _ in ends]
    assert said == [["0 of 2, 1 of 2"], ["0 of 2, 1 of 2"], ["0 of 1"]], ends
    assert "one process trains with all devices of this host" in ends[2][2]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_NTASKS": "4"}, "job has 4 tasks, but srun did not start this one"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "pip install 'jax"),
        (
            srun(1, 0, "1") | {"SLURM_NTASKS": "4"},
            "SLURM_NTASKS is 4, but this step has 1.*by srun",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "do not fit together .*OMPI_COMM_WORLD_RANK"),
    ],
)
def test_a_start_that_was_meant_to_be_of_several(variables, message, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # As JAX does where it finds nothing; here it has been used already.
    nothing = ValueError("coordinator_address should be defined.")
    monkeypatch.setattr("jax.distributed.initialize", unittest.mock.Mock(side_effect=nothing))
    with pytest.raises(UserError, match=message):
        initialize("auto", None, None)


def test_waiting_in_vain_ends_in_one_line():
    program = "from fact_train.multihost.processes import initialize; import sys\n"
    program += "initialize(sys.argv[1], 2, int(sys.argv[2]), arrival_seconds=2)"
    ends = finish([start("-c", program, free_address(), str(process)) for process in (0, 1)])
    for process, (status, _, errors) in enumerate(ends):
        assert status == 2
        assert f"error: process {process}: its 2 processes did not all meet at 127.0" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, 0), "need --coordinator"),
        (("auto", 2, 0), "finds --processes and --process by itself"),
        (("localhost", 2, 0), "expected host:port or auto"),
        (("localhost:1234", 2, None), "needs --processes N and --process I"),
        (("localhost:1234", 2, 2), "--process 2 of --processes 2: they are numbered 0 to N - 1"),
        (("localhost:1234", 0, 0), "--process 0 of --processes 0"),
    ],
)
def test_flags_that_do_not_fit_together(arguments, message):
    with pytest.raises(UserError, match=message):
        initialize(*arguments)
