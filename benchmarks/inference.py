"""What a face costs in a call of the UNet, and how long pictures take.

    python -m benchmarks.inference                        (SD 1.5's size, float32: 9 GB, minutes)
    python -m benchmarks.inference --dtype bfloat16       (PyTorch under autocast)
    python -m benchmarks.inference --size mini            (seconds)
    python -m benchmarks.inference --pictures 1 8 --dtype float16 --compile       (a GPU)

Random weights, gates open. Three sides in PyTorch, on one UNet of diffusers, taking turns: `plain`
without a face; `ours`; `released`, the same adapter as the released code computes it, with all
queries and the attention matrix written out. And `jax`, ours in JAX, in a process of its own.
A time is the best of all runs; the ratios are what it is about.

Whole pictures are those of PNDM with guidance. JAX draws them by the program's own pipeline, from
prompts and crops of faces; PyTorch's start from the text's and the faces' tokens.
"""

import argparse
import dataclasses
import json
import subprocess
import sys

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A named constructor of a UNet, a face's tokens, a side in latents."""

    unet: str
    face_tokens: int
    face_dim: int
    words: int
    cells: int


SIZES = {
    "sd15": Size(unet="sd15", face_tokens=16, face_dim=768, words=77, cells=64),
    "mini": Size(unet="mini", face_tokens=16, face_dim=64, words=24, cells=16),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="sd15")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--batch", type=int, default=2, help="samples in a call of the UNet")
    parser.add_argument("--cells", type=int, help="side of the latents (default: the size's own)")
    parser.add_argument("--runs", type=int, default=3, help="timed calls of each side")
    parser.add_argument("--device", default=None, help="of PyTorch (default: CUDA if there is one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet")
    parser.add_argument("--no-jax", action="store_true", help="PyTorch's sides alone")
    parser.add_argument(
        "--pictures",
        type=int,
        nargs="+",
        metavar="BATCH",
        help="whole pictures instead, with guidance, so many at a time",
    )
    parser.add_argument("--steps", type=int, default=50, help="of each picture")
    parser.add_argument("--in-process", choices=("torch", "jax"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process == "torch":
        from benchmarks.inference_torch import measure

        print(json.dumps(measure(_size(arguments), arguments)))
    elif arguments.in_process == "jax":
        from benchmarks.inference_jax import measure

        print(json.dumps(measure(_size(arguments), arguments)))
    elif arguments.pictures:
        libraries = ("torch",) if arguments.no_jax else ("torch", "jax")
        for library in libraries:
            _report_pictures(_run(library))
    else:
        found = _run("torch")
        if not arguments.no_jax:
            found["seconds"] |= _run("jax")
        _report_calls(found)
    return 0


def _size(arguments: argparse.Namespace) -> Size:
    size = SIZES[arguments.size]
    return dataclasses.replace(size, cells=arguments.cells or size.cells)


def _run(library: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.inference", *sys.argv[1:], "--in-process", library]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _report_calls(found: dict) -> None:
    print(f"{found['device']}; a product of matrices: {found['product'] / 1e9:.0f} GFLOP/s")
    best = {side: min(times) for side, times in found["seconds"].items()}
    for side, times in found["seconds"].items():
        # JAX computes what ours in PyTorch does, in fewer operations or not.
        rate = found["operations"].get(side, found["operations"]["ours"]) / best[side]
        print(
            f"{side:9s} {best[side]:8.4f} s a call, {rate / 1e9:.0f} GFLOP/s "
            f"(all: {', '.join(f'{t:.4f}' for t in times)})"
        )
    print(f"ours / plain in operations: {_ratio(found['operations'], 'ours', 'plain'):.2f}")
    pairs = [("ours", "plain"), ("released", "ours"), ("jax", "ours")]
    for one, other in pairs:
        if one in best:
            print(f"{one} / {other}: {_ratio(best, one, other):.2f}")


def _ratio(values: dict[str, float], one: str, other: str) -> float:
    return values[one] / values[other]


def _report_pictures(found: dict) -> None:
    print(found["device"])
    for row in found["pictures"]:
        case = f"{row['side']}, {row['batch']} at a time"
        if "failed" in row:
            print(f"{case}: {row['failed']}")
            continue
        print(
            f"{case}: {min(row['seconds']):.3f} s a picture, peak "
            f"{(row['device_bytes'] or 0) / 2**30:.2f} GiB on the device, "
            f"{row['host_bytes'] / 2**30:.2f} GiB in the process (weights "
            f"{row['weights'] / 2**30:.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
