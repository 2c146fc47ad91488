"""Which processes and GPUs the variables of srun and mpirun tell of."""

import pytest

from fact_jax.utils.errors import UserError
from fact_train.multihost.launchers import Launch, find_launch, local_devices

# srun --nodes 3 --ntasks 10, task 9 on the last node; what it sets, as far as it matters.
SRUN = {
    "SLURM_JOB_ID": "4100",
    "SLURM_NTASKS": "10",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[01-03]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPIRUN_4 = MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
MPIRUN_5 = MPIRUN | {"PMIX_NAMESPACE": "prterun-gpu-01-12345@1", "PRTE_LAUNCHED": "1"}


def launch(local_processes=4, local_process=1, **changes):
    others = {"launcher": "SLURM", "processes": 8, "process": 5} | changes
    return Launch(local_processes=local_processes, local_process=local_process, **others)


def test_srun():
    assert find_launch(SRUN) == launch(local_processes=2, processes=10, process=9)
    first = SRUN | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert find_launch(first) == launch(local_process=0, processes=10, process=4)


def test_a_job_that_srun_did_not_start():
    assert find_launch({n: v for n, v in SRUN.items() if "STEP" not in n}) is None
    assert find_launch({}) is None


def test_mpirun():
    """JAX reads the address of version 4; the port of version 5 is 61440 + 12345 % 4096."""
    assert find_launch(MPIRUN_4) == launch(launcher="Open MPI")
    assert find_launch(MPIRUN_5) == launch(launcher="Open MPI", coordinator="gpu-01:61497")
    here = MPIRUN_5 | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    assert find_launch(here | {"JAX_COORDINATOR_PORT": "99"}).coordinator == "localhost:99"


def test_mpirun_in_a_slurm_job():
    """Its daemons are started by srun, one a node, and all their children have their numbers."""
    assert find_launch(SRUN | MPIRUN_5) == find_launch(MPIRUN_5)


@pytest.mark.parametrize(
    ("local_processes", "visible", "more", "own"),
    [
        (1, "0,1,2,3,4,5,6,7", {}, []),  # one process a host takes them all
        (4, "0,1,2,3", {}, [1]),
        (4, "4,5,6,7", {}, [1]),  # numbered anew within the process
        (4, "0,1,2,3,4,5,6,7", {}, [2, 3]),
        (4, "5", {}, []),  # bound by the launcher
        (4, "2,3", {"SLURM_GPUS_ON_NODE": "8"}, []),
        (2, "0,1,2,3", {"SLURM_GPUS_ON_NODE": "8"}, []),
        (2, "0,1,2,3", {"SLURM_GPUS_ON_NODE": "4"}, [2, 3]),
        (4, "0,1,2,3", {"JAX_LOCAL_DEVICE_IDS": "3"}, None),
    ],
)
def test_gpus_of_a_process(local_processes, visible, more, own):
    environment = {"CUDA_VISIBLE_DEVICES": visible, **more}
    assert local_devices(launch(local_processes), environment) == own


def test_gpus_that_do_not_divide():
    for processes in (3, 16):
        with pytest.raises(UserError, match=f"8 GPUs do not divide over the {processes} processes"):
            local_devices(launch(processes), {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})


def test_gpus_are_counted_where_no_variable_lists_them(monkeypatch):
    found = [f"/dev/nvidia{i}" for i in range(8)]
    monkeypatch.setattr("fact_train.multihost.launchers.glob.glob", lambda pattern: found)
    assert local_devices(launch(), {}) == [2, 3]
    monkeypatch.setattr("fact_train.multihost.launchers.glob.glob", lambda pattern: [])
    assert local_devices(launch(), {}) is None
