"""Several processes that train as one: joining them, and checks that they agree."""

import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax

from fact_jax.utils.errors import UserError, describe_os_error, first_line
from fact_train.config import TrainConfig
from fact_train.multihost.collectives import process_gather, raise_on_all_processes
from fact_train.multihost.launchers import Launch, find_launch, local_devices
from fact_train.overrides import to_json

ARRIVAL_SECONDS = 300
# Long enough for the slowest to leave, short enough that a failed run does not hold a pod.
LEAVING_SECONDS = 30
_host: str | None = None
# A network file system may show a new file a moment later.
_VISIBLE_SECONDS = 5


def initialize(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    arrival_seconds: int = ARRIVAL_SECONDS,
) -> None:
    """Join the other processes of the run. Must come before anything touches a device.

    ``coordinator`` is the ``host:port`` on which process 0 listens (how many there are and which
    this is may then come from srun or mpirun); or ``auto``, and SLURM, Open MPI, Kubernetes or TPU
    metadata say it all, or nothing does and the process is alone with all devices of its host, as
    it is with None. UserError if the three do not fit together. The program ends with status 2 if
    not all processes arrive in time.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise UserError("--processes and --process need --coordinator host:port")
        return
    launch = _launched(coordinator, processes, process)
    settings: dict[str, Any] = {
        "initialization_timeout": 10 * arrival_seconds,
        "shutdown_timeout_seconds": LEAVING_SECONDS,
    }
    address = coordinator
    if launch is not None:
        if launch.processes == 1:
            return
        processes, process = launch.processes, launch.process
        settings["local_device_ids"] = local_devices(launch, os.environ)
        address = (launch.coordinator or "auto") if coordinator == "auto" else coordinator
    settings |= {"num_processes": processes, "process_id": process}
    if address != "auto":
        settings |= {"coordinator_address": address, "cluster_detection_method": "deactivate"}
    if coordinator != "auto":
        global _host
        _check(coordinator, processes, process)
        _host = coordinator.rpartition(":")[0].strip("[]")
    # JAX itself ends the program with a stack trace of its own if others do not come.
    late = threading.Timer(arrival_seconds, _give_up, (address, processes, process))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(**settings)
    except Exception as error:  # of any type: metadata servers and Kubernetes' client are asked
        if launch is None and str(error).startswith("coordinator_address should be defined"):
            return _say_alone()
        raise UserError(
            f"--coordinator {coordinator}: {first_line(error, 200)}; auto is for TPU pods, SLURM, "
            "Kubernetes and Open MPI, elsewhere give --coordinator host:port --processes N "
            "--process I"
        ) from error
    finally:
        late.cancel()


def _launched(coordinator: str, processes: int | None, process: int | None) -> Launch | None:
    """What srun or mpirun say, where the command line leaves it to them."""
    if processes is not None or process is not None:
        if coordinator == "auto":
            raise UserError("--coordinator auto finds --processes and --process by itself")
        return None
    try:
        return find_launch(os.environ)
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"--coordinator {coordinator}: SLURM's or Open MPI's variables do not fit together "
            f"({first_line(error)}): start it by srun or mpirun, or give --coordinator host:port "
            "--processes N --process I"
        ) from error


def _say_alone() -> None:
    """Nobody started other processes; UserError where it looks as if somebody meant to."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        raise UserError("--coordinator auto asks Kubernetes by its client: pip install 'jax[k8s]'")
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        raise UserError(
            f"--coordinator auto: this SLURM job has {os.environ['SLURM_NTASKS']} tasks, but srun "
            "did not start this one: srun fact-train run ..."
        )
    print(
        "--coordinator auto: no SLURM, Open MPI, Kubernetes or TPU pod here, one process trains "
        "with all devices of this host",
        file=sys.stderr,
        flush=True,
    )


def _give_up(address: str, processes: int | None, process: int | None) -> None:
    who = "the processes" if process is None else f"process {process}: its {processes} processes"
    print(
        f"error: {who} did not all meet at {address}; start them all within a few minutes, "
        "numbered from 0, with the same --coordinator and --processes",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _check(coordinator: str, processes: int | None, process: int | None) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--coordinator {coordinator}: expected host:port or auto")
    if processes is None or process is None:
        raise UserError("--coordinator host:port needs --processes N and --process I")
    if not 0 <= process < processes:
        raise UserError(
            f"--process {process} of --processes {processes}: they are numbered 0 to N - 1"
        )


def check_alike(config: TrainConfig) -> None:
    """UserError if the processes of this run were given different settings."""
    own = json.dumps(to_json(config), sort_keys=True)
    digests = process_gather(hashlib.sha256(own.encode()).hexdigest())
    other = [str(i) for i, digest in enumerate(digests) if digest != digests[0]]
    if other:
        raise UserError(
            f"process {', '.join(other)} of {len(digests)} was given other settings than process 0"
        )


def check_same(digests: Mapping[str, str | None], advice: str) -> None:
    """UserError if two processes differ in one of these digests (name of the thing -> digest)."""
    for name, digest in digests.items():
        found = [
            text.split(maxsplit=1) for text in process_gather(f"{digest or '-'} {host_name()}")
        ]
        other = [i for i, (theirs, _) in enumerate(found) if theirs != found[0][0]]
        if other:
            which = ", ".join(f"{i} ({found[i][1]}, {found[i][0][:12]})" for i in other)
            raise UserError(
                f"process {which} of {len(found)} has another {name} than process 0 "
                f"({found[0][1]}, {found[0][0][:12]}): {advice}"
            )


def check_shared(folder: Path) -> None:
    """UserError if ``folder``, which is made if need be, is not one and the same on all hosts."""
    if jax.process_count() == 1:
        return
    path = folder / f".shared-{process_gather(secrets.token_hex(8))[0]}"
    with raise_on_all_processes():
        try:
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                path.touch()
        except OSError as error:
            raise UserError(f"--out {describe_os_error(error)}") from error
    until = time.monotonic() + _VISIBLE_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    said = process_gather("" if seen else f"({host_name()}, {folder.absolute()})")
    if jax.process_index() == 0:
        with suppress(OSError):
            path.unlink()
    without = [f"{process} {text}" for process, text in enumerate(said) if text]
    if without:
        raise UserError(
            f"process {', '.join(without)} of {len(said)} does not see the folder that process 0 "
            "writes: give an --out that all hosts share"
        )


def coordinator_host() -> str | None:
    """Where process 0 was said to be; None if it was found automatically."""
    return _host


def host_name() -> str:
    """The name of this host, as it calls itself."""
    return socket.gethostname() or "unknown"
