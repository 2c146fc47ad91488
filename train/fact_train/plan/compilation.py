"""The real training step, compiled for chips that are not here; a process of its own.

What the compilers want in the environment must be there before JAX is imported, so
:func:`compiled_stats` starts `python -m fact_train.plan.compiled_stats` and reads its JSON.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from fact_jax.utils.errors import UserError
from fact_train.plan.targets import Target

SHOW_EVERY = 30  # seconds, where nobody watches a screen


class CompiledStats(TypedDict):
    """What is known of one training step.

    ``flops`` and ``model_flops`` are those of all devices, the rest is that of one: ``bytes`` by
    what holds them; ``usable`` bytes, None where the compiler does not say. What is read from the
    program is None where it does not fit: ``accessed`` (bytes read and written), ``kernels`` (name
    and how often it runs) and ``collectives``.
    """

    notes: list[str]
    parameters: dict[str, int]
    bytes: dict[str, float]
    flops: int
    model_flops: int
    usable: float | None
    accessed: int | None
    kernels: dict[str, int] | None
    collectives: list[dict[str, Any]] | None
    seconds: float


def compiled_stats(config: str, overrides: Sequence[str], target: Target) -> CompiledStats:
    """Everything that is read from the step, in a fresh process while its time is shown.

    UserError for a bad request, or where the compiler is not installed.
    """
    environment = target.environment()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "stats.json")
        request = json.dumps([config, list(overrides), dataclasses.asdict(target)])
        command = [sys.executable, "-m", "fact_train.plan.compiled_stats", request, str(found)]
        with (
            open(Path(folder, "errors.txt"), "w+") as errors,
            subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stderr=errors
            ) as child,
        ):
            _wait(child, f"compiling for {target.name}")
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
        stats = json.loads(found.read_text())
    if "error" in stats:
        raise UserError(stats["error"])
    return stats


def _wait(child: subprocess.Popen, doing: str) -> None:
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
