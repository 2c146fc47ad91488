"""Everything that can be said on a GPU or TPU, in one command and one table.

    python -m benchmarks.accelerator                        (SD 1.5's size; an hour or two)
    python -m benchmarks.accelerator --json found.json      (every single number)
    python -m benchmarks.accelerator --only attention step
    python -m benchmarks.accelerator --size mini            (what a CPU gets: minutes)

Parity of models, samplers and attention with the CPU and with the plain form; a training step and
whole pictures, in JAX and in PyTorch, which measures on CUDA alone. Weights are random, so nothing
is downloaded. Each part is a process of its own on one device, so that neither library holds the
other's memory; one that fails becomes a row that says so. Times are medians after a first run.

The exit code is 0 if every comparison was made and no error is larger than allowed, else 1. Why so
much is allowed: float32 sums in another order on another device, through a hundred layers;
bfloat16 has eight bits of mantissa, so that every layer rounds by up to 0.4 %.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fact_jax.utils.files import atomic_write

GROUPS = ("models", "samplers", "attention", "step", "pictures")
COMPARED = GROUPS[:3]
LIBRARIES = {
    "jax": ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu"),
    "torch": ("torch", "diffusers", "transformers", "triton"),
}
TIMEOUT = 3600
"""Seconds that a part may take."""
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One process: a row of the table or, of a comparison, several."""

    group: str
    library: str
    command: tuple[str, ...]
    by: str = ""
    case: str = ""


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=("sd15", "mini"), help="(default: by the device)")
    parser.add_argument("--only", choices=GROUPS, nargs="+", default=GROUPS)
    parser.add_argument("--batch", type=int, help="samples in a training step (16; mini: 2)")
    parser.add_argument("--steps", type=int, help="of a picture (50; mini: 2)")
    parser.add_argument("--runs", type=int, default=5, help="timed ones")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: no such folder")
    if options.in_process:
        print(json.dumps(_measure(options)))
        return 0
    devices = {name: run_part(_in_process(name), "versions") for name in LIBRARIES}
    here = [name for name, found in devices.items() if found.get("platform", "cpu") != "cpu"]
    size = options.size or ("sd15" if here else "mini")
    libraries = here if here and size == "sd15" else list(LIBRARIES)
    rows = []
    for part in parts(size, on_cpu=not here, options=options):
        if part.library in libraries:
            found = run_part(part.command, f"{part.group} {part.by}".strip())
        else:
            found = {"failed": f"{part.library} has no accelerator here"}
        rows += part_rows(part, found)
    add_ratios(rows)
    print("\n".join(table(devices, rows)))
    if options.json:
        found = {"size": size, "devices": devices, "rows": rows, "parity": parity(rows)}
        with atomic_write(options.json) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if parity(rows) is not False else 1


def _in_process(name: str, *words: str) -> tuple[str, ...]:
    return ("benchmarks.accelerator", "--in-process", name, *words)


def parts(size: str, *, on_cpu: bool, options: argparse.Namespace) -> Iterator[Part]:
    """What is asked for, in the order of the table."""
    mini, runs = size == "mini", ("--runs", str(options.runs))
    dtype = "float32" if on_cpu else "bfloat16"
    compiled = (False,) if options.no_compile else (False, True)
    for group in COMPARED:
        if group in options.only:
            words = _in_process(group, "--size", size, *runs)
            yield Part(group=group, library="jax", command=words)
    if "step" in options.only:
        batch = options.batch or (2 if mini else 16)
        step = ("benchmarks.step", "--size", size, "--precision", dtype, "--batch", str(batch))
        step += ("--steps", str(options.runs), *(() if mini else ("--cells", "64")))
        sides = [
            ("jax", f"JAX, remat={remat}", ("--side", "ours", "--remat", remat))
            for remat in ("block", "none")
        ]
        for on in compiled:
            words = ("--side", "pytorch", "--compile") if on else ("--side", "pytorch")
            sides.append(("torch", _torch(on), words))
        for library, by, words in sides:
            case, command = f"{batch} samples", (*step, *words)
            yield Part(group="step", library=library, by=by, case=case, command=command)
    if "pictures" in options.only:
        draw = ("benchmarks.inference", "--size", size, "--dtype", dtype, *runs)
        draw += ("--steps", str(options.steps or (2 if mini else 50)))
        sides = [("jax", "JAX", ("--in-process", "jax"))]
        for on in compiled:
            words = ("--in-process", "torch", *(("--compile",) if on else ()))
            sides.append(("torch", _torch(on), words))
        for batch in (1, 8):
            for library, by, words in sides:
                case, command = f"{batch} at a time", (*draw, "--pictures", str(batch), *words)
                yield Part(group="pictures", library=library, by=by, case=case, command=command)


def _torch(compiled: bool) -> str:
    return "PyTorch compiled" if compiled else "PyTorch eager"


def run_part(command: tuple[str, ...], name: str) -> dict:
    """The JSON on the last line that a module prints; ``failed`` says why there is none."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT} s"}
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return {"failed": reason(done.returncode, done.stderr)}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"failed": "ended without a result"}


def _environment() -> dict[str, str]:
    """One GPU for both libraries; and for JAX a CPU beside it, whatever else it is told to use."""
    variables = dict(os.environ)
    variables["CUDA_VISIBLE_DEVICES"] = variables.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if platforms := variables.get("JAX_PLATFORMS"):
        names = platforms.split(",")
        variables["JAX_PLATFORMS"] = ",".join(names if "cpu" in names else [*names, "cpu"])
    return variables


def reason(status: int, errors: str) -> str:
    """Why a process failed: the last line that names an error, or else the last one at all."""
    if status < 0:
        return f"ended by signal {-status}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(error|exception)\b", line, re.I)]
    return ((named or lines)[-1:] or [f"exit code {status}"])[0][:200]


def part_rows(part: Part, found: dict) -> list[Row]:
    """The rows of the table that a process's JSON is."""
    row: Row = {"group": part.group, "by": part.by, "case": part.case}
    if "failed" in found:
        return [row | found]
    if part.group in COMPARED:
        return [
            row | case | {"ok": case.get("error", math.inf) <= case["most"]}
            for case in found["rows"]
        ]
    if part.group == "step":
        return [row | found]
    return [
        row | picture | {"case": f"{picture['side']}, {part.case}"} for picture in found["pictures"]
    ]


def parity(rows: list[Row]) -> bool | None:
    """Whether every comparison was made and is close enough; None if none was asked for."""
    compared = [row.get("ok", False) for row in rows if row["group"] in COMPARED]
    return all(compared) if compared else None


def add_ratios(rows: list[Row]) -> None:
    """``ratios``: times over those of the peers; ``mfu``: by the FLOPs that JAX's side counts."""
    times = {_key(row): _median(row) for row in rows if "seconds" in row}
    flops, peak = next(
        ((row["model_flops"], row["peak"]) for row in rows if row.get("model_flops")), (0, None)
    )
    for row in rows:
        if "seconds" not in row:
            continue
        if row["group"] == "attention":
            row["ratios"] = {"the plain form": row["seconds"] / row["plain_seconds"]}
            continue
        row["ratios"] = {
            name: _median(row) / times[key] for name, key in _peers(row) if key in times
        }
        if row["group"] == "step" and peak:
            row["mfu"] = flops / _median(row) / peak


def _key(row: Row) -> tuple[str, str, str]:
    return row["group"], row["by"], row["case"]


def _median(row: Row) -> float:
    return statistics.median(row["seconds"]) if isinstance(row["seconds"], list) else row["seconds"]


def _peers(row: Row) -> Iterator[tuple[str, tuple[str, str, str]]]:
    """What a time is compared with, and the key of its row."""
    group, by, case = _key(row)
    if by.startswith("JAX"):
        for other in (_torch(False), _torch(True)):
            yield other, (group, other, case)
    if group == "pictures":
        side, batch = case.split(", ")
        for other in {"face": ("plain",), "released": ("plain", "face")}.get(side, ()):
            yield other, (group, by, f"{other}, {batch}")
        if by == "JAX" and side == "face":
            for other in (_torch(False), _torch(True)):
                yield f"{other}, released", (group, other, f"released, {batch}")


def table(devices: dict[str, dict], rows: list[Row]) -> Iterator[str]:
    """One table in Markdown."""
    yield "| part | case | measured | time over that of |"
    yield "|---|---|---|---|"
    for name, found in devices.items():
        yield f"| versions | {name} | {found.get('failed') or found['text']} | |"
    for row in rows:
        case = ", ".join(filter(None, (row["by"], row["case"])))
        ratios = ", ".join(f"{name}: {ratio:.2f}" for name, ratio in row.get("ratios", {}).items())
        yield f"| {row['group']} | {case} | {_measured(row)} | {ratios} |"


def _measured(row: Row) -> str:
    if "failed" in row:
        return f"**failed**: {row['failed']}".replace("|", "/")
    if row["group"] in COMPARED:
        verdict = "" if row["ok"] else ", **too large**"
        took = f", {1000 * row['seconds']:.3g} ms" if "seconds" in row else ""
        return f"error {row['error']:.1e} of {row['most']:.0e} allowed{verdict}{took}"
    seconds, memory = _median(row), row["device_bytes"]
    if row["group"] == "step":
        batch = int(row["case"].split()[0])
        figures = [f"{batch / seconds:.3g} samples a second ({1000 * seconds:.4g} ms)"]
        figures += [f"MFU {row['mfu']:.0%}"] if "mfu" in row else []
    else:
        figures = [f"{seconds:.3g} s a picture"]
    figures += [] if memory is None else [f"peak {memory / 1e9:.1f} GB"]
    return ", ".join([*figures, f"the first {row['first_seconds']:.0f} s"])


def _measure(options: argparse.Namespace) -> dict:
    """A part that is this module's own, in this process."""
    if options.in_process in LIBRARIES:
        return _versions(options.in_process)
    from benchmarks import accelerator_parity as parity

    if options.in_process == "models":
        return {"rows": parity.models(options.size)}
    if options.in_process == "samplers":
        return {"rows": parity.samplers()}
    return {"rows": parity.attention_forms(options.size, options.runs)}


def _versions(library: str) -> dict:
    """Platform (``cpu`` where there is no accelerator), and device and packages as a line."""
    if library == "jax":
        import jax

        devices = jax.devices()
        platform, name = devices[0].platform, f"{len(devices)} x {devices[0].device_kind}"
    else:
        import torch

        platform = "cuda" if torch.cuda.is_available() else "cpu"
        name = f"1 x {torch.cuda.get_device_name()}" if platform == "cuda" else "cpu"
        name += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    packages = {}
    for package in LIBRARIES[library]:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    text = ", ".join([name, *(f"{package} {version}" for package, version in packages.items())])
    return {"platform": platform, "text": text, "packages": packages}


if __name__ == "__main__":
    sys.exit(main())
