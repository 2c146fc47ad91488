"""The real training step, compiled for chips that are not there; a process of its own.

`python -m fact_train.plan.compilation REQUEST FACTS` reads and writes JSON. What the TPU compiler
wants in the environment must be there before JAX is imported, so :func:`facts_of` starts a fresh
process.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from fact_jax.utils.errors import UserError
from fact_train.config import load_config, override

Facts = dict[str, Any]
SHOW_EVERY = 30  # seconds, where nobody watches a screen
_QUIET_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to look at. ``topology`` as ``v5e:16x16``, or None: count, but compile nothing."""

    config: str
    overrides: tuple[str, ...]
    topology: str | None
    chips: int


def facts_of(request: Request) -> Facts:
    """Everything that is read from the step, made in a fresh process while its time is shown.

    UserError for a bad request, or where the TPU compiler is not installed.
    """
    if request.topology and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "the TPU compiler is not installed (no TPU is needed for it): pip install 'jax[tpu]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        asked, found = Path(folder, "request.json"), Path(folder, "facts.json")
        asked.write_text(json.dumps(dataclasses.asdict(request)))
        command = [sys.executable, "-m", "fact_train.plan.compilation", str(asked), str(found)]
        environment = os.environ | _QUIET_TPU | {"JAX_PLATFORMS": "cpu"}
        if request.topology is None:
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={request.chips}"
        with (
            open(Path(folder, "errors.txt"), "w+") as errors,
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stderr=errors
            ) as child,
        ):
            _watch(child, f"compiling for {request.topology}" if request.topology else "counting")
            if child.returncode < 0:
                raise UserError(
                    f"the compiler was ended by signal {-child.returncode}, most likely for want "
                    "of memory: a step of Stable Diffusion 1.5's size takes it several GB"
                )
            errors.seek(0)
            if child.returncode or not found.is_file():
                raise RuntimeError(
                    f"plan's process ended with {child.returncode}:\n{errors.read()}"
                )
        facts = json.loads(found.read_text())
    if "error" in facts:
        raise UserError(facts["error"])
    return facts


def _watch(child: subprocess.Popen, doing: str) -> None:
    """Wait, and say how long it has been."""
    start, screen = time.monotonic(), sys.stderr.isatty()
    try:
        while True:
            try:
                child.wait(1 if screen else SHOW_EVERY)
                break
            except subprocess.TimeoutExpired:
                seconds = time.monotonic() - start
                line = f"{doing}: {int(seconds // 60)}:{int(seconds % 60):02d}"
                print(line, end="\r" if screen else "\n", file=sys.stderr, flush=True)
    finally:
        if child.poll() is None:
            child.terminate()
        if screen:
            print(" " * (len(doing) + 10), end="\r", file=sys.stderr)


def main(asked: str, found: str) -> None:
    """The fresh process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    fields = json.loads(Path(asked).read_text())
    request = Request(**fields | {"overrides": tuple(fields["overrides"])})
    try:
        facts = _facts(request)
    except UserError as error:
        facts = {"error": str(error)}
    Path(found).write_text(json.dumps(facts))


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the other end is closed, however the parent ended
    os._exit(1)


def _facts(request: Request) -> Facts:
    _, config = load_config(request.config)
    config = override(config, request.overrides)
    from fact_train.plan.compiled_stats import compiled_facts, estimated_facts

    if request.topology:
        return compiled_facts(config, request.topology)
    return estimated_facts(config, request.chips)


if __name__ == "__main__":
    main(*sys.argv[1:])
