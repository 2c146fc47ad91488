"""Compilation for chips that are not here, in a process of its own.

What the compilers want in the environment must be there before JAX is imported, so
:func:`compile_for` starts `python -m MODULE REQUEST FILE`, whose ``main`` is
:func:`serve_request`, and reads its JSON.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fact_jax.plan.targets import Target
from fact_jax.utils.errors import UserError

SHOW_EVERY = 30  # seconds, where nobody watches a screen


def compile_for(module: str, request: Any, target: Target) -> Any:
    """What ``module`` answers to ``request`` (both JSON) in a fresh process for ``target``.

    UserError for a bad request, or where the compiler is not installed.
    """
    environment = target.environment()
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "answer.json")
        text = json.dumps([request, dataclasses.asdict(target)])
        with (
            open(Path(folder, "errors.txt"), "w+") as errors,
            subprocess.Popen(
                [sys.executable, "-m", module, text, str(found)],
                env=environment,
                stdin=subprocess.PIPE,
                stderr=errors,
            ) as child,
        ):
            _wait(child, f"compiling for {target.name}")
            if child.returncode < 0:
                raise UserError(
                    f"the compiler was ended by signal {-child.returncode}, most likely for want "
                    "of memory: programs of Stable Diffusion 1.5's size take it several GB"
                )
            errors.seek(0)
            if child.returncode or not found.is_file():
                raise RuntimeError(
                    f"plan's process ended with {child.returncode}:\n{errors.read()}"
                )
        said = json.loads(found.read_text())
    if "error" in said:
        raise UserError(said["error"])
    return said["answer"]


def serve_request(respond: Callable[[Any, Target], Any], request: str, file: str) -> None:
    """The process that :func:`compile_for` starts; it ends with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asked, target = json.loads(request)
    try:
        said = {"answer": respond(asked, Target(**target))}
    except UserError as error:
        said = {"error": str(error)}
    Path(file).write_text(json.dumps(said))


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the other end is closed, however the parent ended
    os._exit(1)


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
