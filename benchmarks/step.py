"""One training step: ours against the same step written plainly in PyTorch.

Both train the same adapters and resampler, with random weights, on a frozen UNet: text encoder on
the captions, denoising error plus FAIR, gradient clipping, AdamW. PyTorch's has diffusers' UNet,
fused attention and autocast. Each runs in a process of its own, on a GPU or TPU if it finds one.

    python -m benchmarks.step                  (Stable Diffusion 1.5's size, 256 x 256: 12 GB)
    python -m benchmarks.step --size mini      (seconds)
    python -m benchmarks.step --cells 64 --batch 16 --precision bfloat16 --compile    (a GPU)
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fact_jax.utils.errors import UserError

SIDES = ("ours", "pytorch")
GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """What is trained: a base (its shapes), a face's tokens, and a picture's side in latents."""

    base: str
    encoder: str
    tokens: int
    cells: int


SIZES = {
    "sd15": Size(base="stable-diffusion-v1-5", encoder="transface", tokens=144, cells=32),
    "mini": Size(base="miniature/base", encoder="miniature/encoder", tokens=36, cells=8),
}


class Side(NamedTuple):
    """A step that returns its loss, and what is known of it.

    ``trainable`` numbers; peak bytes on the device (None on a CPU); FLOPs of a step without
    recomputation, and those that the device can do in a second, where they are known.
    """

    step: Callable[[], float]
    trainable: int
    device_bytes: Callable[[], int | None]
    model_flops: int | None = None
    peak: float | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--cells", type=int, help="side of the latents (default: the size's own)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile PyTorch's side")
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one that is not")
    parser.add_argument("--remat", choices=("none", "dots", "block"), default="none")
    parser.add_argument("--side", choices=SIDES, help="this one alone, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(measure(arguments)))
        return 0
    found = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.step", *sys.argv[1:], "--side", side]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
        print(f"{side:8s} {line(found[side])}", flush=True)
    ours, theirs = (found[side] for side in SIDES)
    if ours["trainable"] != theirs["trainable"]:
        raise SystemExit("error: the two sides do not train the same number of parameters")
    print(
        f"ours / PyTorch: time {best(ours) / best(theirs):.2f}, memory of a step "
        f"{ours['step_bytes'] / theirs['step_bytes']:.2f}, of the whole process "
        f"{ours['process_bytes'] / theirs['process_bytes']:.2f}"
    )
    return 0


def best(found: dict) -> float:
    return min(found["seconds"])


def line(found: dict) -> str:
    return (
        f"{best(found):.3f} s a step (median {statistics.median(found['seconds']):.3f}, first "
        f"{found['first_seconds']:.1f}), peak {found['step_bytes'] / GB:.2f} GB in a step, "
        f"{found['process_bytes'] / GB:.2f} GB in all, {found['trainable']:,} trained, loss "
        f"{found['loss']:.3f}"
    )


def measure(arguments: argparse.Namespace) -> dict:
    """Times and peaks of one side, in this process."""
    size = SIZES[arguments.size]
    size = dataclasses.replace(size, cells=arguments.cells or size.cells)
    if arguments.side == "ours":
        from benchmarks.step_ours import make
    else:
        from benchmarks.step_pytorch import make

    side = make(size, arguments)
    first, loss = _timed(side.step)
    before = _peak()
    _forget_peak()
    runs = [_timed(side.step) for _ in range(arguments.steps)]
    return {
        "seconds": [seconds for seconds, _ in runs],
        "first_seconds": first,
        "loss": loss,
        "step_bytes": _peak(),
        "process_bytes": max(before, _peak()),
        "device_bytes": side.device_bytes(),
        "trainable": side.trainable,
        "model_flops": side.model_flops,
        "peak": side.peak,
    }


def _timed(step: Callable[[], float]) -> tuple[float, float]:
    start = time.perf_counter()
    loss = step()
    return time.perf_counter() - start, loss


def _peak() -> int:
    """The most memory that this process has had resident since it was last asked to forget."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError as error:
        raise UserError("peak memory is read from /proc: this benchmark needs Linux") from error
    return next(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith("VmHWM"))


def _forget_peak() -> None:
    # What compiling has left with the allocator, unused, is no part of a step.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    sys.exit(main())
