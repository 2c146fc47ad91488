"""A base whose UNet is wider and computes the same: every channel stands there several times.

So the best settings of an adapter can be compared over widths on one and the same base. After
Net2Net (Chen et al., arXiv 1511.05641), without noise: outputs are repeated, what reads them
takes the mean. Heads become wider, their number stays, as in Stable Diffusion 1.5.

    python -m benchmarks.widen miniature/base 2 runs/wide/base
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load_file, save_file

from fact_jax.utils.files import replace_folder

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONFIG = "unet/config.json"


def widen_parameter(
    key: str, array: Float[np.ndarray, "..."], factor: int
) -> Float[np.ndarray, "..."]:
    """The parameter of diffusers' UNet ``key``, in float32, of a UNet ``factor`` times as wide."""
    array = array.astype(np.float32)
    layer = key.rsplit(".", 1)[0]
    if array.ndim > 1:
        if layer == "time_embedding.linear_1":
            # Sinusoids of a wider embedding lie closer: every ``factor``-th is one of before.
            wide = np.zeros((len(array), factor * array.shape[1]), np.float32)
            wide[:, ::factor] = array
            array = wide
        elif layer != "conv_in" and not layer.endswith(("attn2.to_k", "attn2.to_v")):
            array = np.repeat(array, factor, axis=1) / factor
    if layer.endswith("to_q"):
        # Products of wider heads are ``factor`` times as large, their scale gives back the root.
        array = array / math.sqrt(factor)
    return array if layer == "conv_out" else np.repeat(array, factor, axis=0)


def widen(base: Path, factor: int, out: Path) -> None:
    """Write the base, a diffusers folder, with a UNet ``factor`` times as wide to ``out``."""
    config = json.loads((base / CONFIG).read_text())
    config["block_out_channels"] = [factor * width for width in config["block_out_channels"]]
    state = load_file(base / WEIGHTS)
    wide = {key: widen_parameter(key, array, factor) for key, array in state.items()}
    with replace_folder(out, replace=False) as folder:
        shutil.copytree(base, folder, dirs_exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(wide, folder / WEIGHTS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("factor", type=int, help="at least 2")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    if arguments.factor < 2:
        parser.error(f"factor must be at least 2, got {arguments.factor}")
    if not (arguments.base / WEIGHTS).is_file():
        parser.error(f"{arguments.base} has no {WEIGHTS}: it must be a diffusers folder")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already")
    widen(arguments.base, arguments.factor, arguments.out)


if __name__ == "__main__":
    main()
