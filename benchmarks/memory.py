"""What host memory a PyTorch generation takes, against the size of its weights.

    python -m benchmarks.memory                     # SD 1.5's size, half precision, random weights

Base, adapter and encoder are written to a temporary folder; a process loads them as `fact-infer
generate --backend torch` does and encodes a face. Its peak is given with and without what the
libraries alone take. With CUDA the models go to the device, and the peak is still the host's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

DTYPES = ("float16", "bfloat16", "float32")


def _load(folder: Path, dtype: str) -> dict[str, int]:
    import numpy as np
    import torch

    from fact_infer.torch.pipeline import TorchPipeline

    libraries = peak()
    pipeline = TorchPipeline.load(folder / "base", folder / "adapter", dtype=getattr(torch, dtype))
    size = pipeline.fact.encoder.config.img_size
    tokens = pipeline.fact.face_tokens(np.zeros((1, 1, size, size, 3), np.uint8))
    if not bool(torch.isfinite(tokens).all()):
        raise SystemExit("error: the face's tokens are not finite")
    pipe, fact = pipeline.pipe, pipeline.fact
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, fact.encoder, fact.resampler):
        for tensor in module.parameters():  # the adapters are the UNet's; unread pages are not here
            tensor.clone()
    return {"libraries": libraries, "peak": peak()}


def peak() -> int:
    """The most bytes this process has had in memory."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--loaded", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.loaded is not None:
        print(json.dumps(_load(arguments.loaded, arguments.dtype)))
        return
    from benchmarks.random_weights import write_everything

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_everything(folder, arguments.dtype)
        weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        command = [sys.executable, "-m", "benchmarks.memory", "--dtype", arguments.dtype]
        command += ["--loaded", str(folder)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    own = found["peak"] - found["libraries"]
    print(f"weights {weights / 1e9:.2f} GB, libraries alone {found['libraries'] / 1e9:.2f} GB")
    print(f"peak {found['peak'] / 1e9:.2f} GB, {found['peak'] / weights:.2f} of the weights")
    print(f"without the libraries {own / 1e9:.2f} GB, {own / weights:.2f} of the weights")


if __name__ == "__main__":
    main()
