"""What srun and mpirun say of the processes that they start.

JAX finds SLURM, Kubernetes, TPU pods and Open MPI 4 by itself. Open MPI 5 it does not know (0.10)
or asks mpi4py about (0.11), and under both launchers it takes one GPU a process, however many there
are, by an index that is wrong where the launcher has bound each process to its own.
"""

import dataclasses
import glob
import re
from collections.abc import Mapping

from fact_jax.utils.errors import UserError

_FIRST_PORT, _PORTS = 61440, 4096  # as JAX picks one
_SLURM = ("PROCID", "LOCALID", "NODEID", "STEP_NODELIST", "STEP_TASKS_PER_NODE")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """This process among those of the run, and among those of its host."""

    launcher: str
    processes: int
    process: int
    local_processes: int
    local_process: int
    coordinator: str | None = None
    """``host:port``, or None: JAX knows."""


def find_launch(environment: Mapping[str, str]) -> Launch | None:
    """What the launcher says; None if there is none, or one that JAX knows better.

    KeyError, ValueError or IndexError where its variables do not fit together.

    Open MPI goes first: its mpirun starts its own daemons by srun, whose numbers they inherit.
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:
        names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
        size, rank, here, local = (int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in names)
        return Launch(
            launcher="Open MPI",
            processes=size,
            process=rank,
            local_processes=here,
            local_process=local,
            coordinator=_beside_mpirun(environment, alone=here == size),
        )
    if all(f"SLURM_{name}" in environment for name in ("JOB_ID", "NTASKS", *_SLURM)):
        process, local, node = (int(environment[f"SLURM_{name}"]) for name in _SLURM[:3])
        tasks = environment["SLURM_NTASKS"]
        counts = _counts(environment["SLURM_STEP_TASKS_PER_NODE"])
        if int(tasks) != sum(counts):  # as in the shell of salloc, itself a step of one task
            raise ValueError(f"SLURM_NTASKS is {tasks}, but this step has {sum(counts)}")
        return Launch(
            launcher="SLURM",
            processes=sum(counts),
            process=process,
            local_processes=counts[node],
            local_process=local,
        )
    return None


def local_devices(launch: Launch, environment: Mapping[str, str]) -> list[int] | None:
    """Which of the GPUs that this process sees are its own: [] all of them, None as JAX has it.

    The processes of a host share its GPUs evenly, unless each was bound to its own already.
    UserError if they do not come out even.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    if launch.local_processes == 1:
        return []
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    seen = len(glob.glob("/dev/nvidia[0-9]*") if listed is None else listed.split(","))
    if not seen:
        return None
    if seen == 1 or seen < int(environment.get("SLURM_GPUS_ON_NODE", 0)):
        return []
    share, rest = divmod(seen, launch.local_processes)
    if rest or not share:
        raise UserError(
            f"{seen} GPUs do not divide over the {launch.local_processes} processes that "
            f"{launch.launcher} started here: start one for each GPU, or one for each host"
        )
    return list(range(launch.local_process * share, (launch.local_process + 1) * share))


def _beside_mpirun(environment: Mapping[str, str], *, alone: bool) -> str | None:
    """Where mpirun of Open MPI 5 runs, as ``prterun-HOST-PID@1`` says, and a port for this job."""
    found = re.fullmatch(r"prte\w*-(.+)-(\d+)@\d+", environment.get("PMIX_NAMESPACE", ""))
    if found is None:
        return None
    port = environment.get("JAX_COORDINATOR_PORT", _FIRST_PORT + int(found[2]) % _PORTS)
    return f"{'localhost' if alone else found[1]}:{port}"


def _counts(text: str) -> list[int]:
    """``4(x2),1`` -> [4, 4, 1], the tasks of each node."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(count) for count, times in found for _ in range(int(times or 1))]
