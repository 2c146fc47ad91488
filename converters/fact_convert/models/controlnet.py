"""A ControlNet as diffusers' folder, read and written."""

import os
from pathlib import Path

import jax.numpy as jnp

from fact_convert.io.hub import local_folder
from fact_convert.io.json_io import read_json
from fact_convert.io.output_paths import output_folder
from fact_convert.io.weight_files import read_weights
from fact_convert.models.pipeline import save_part
from fact_convert.models.validation import check_fits
from fact_convert.weights import load_state, read_config
from fact_jax.models.controlnet import ControlNet, ControlNetConfig
from fact_jax.utils.errors import UserError, error_context

_STEM = "diffusion_pytorch_model"


def find_controlnet(
    path: str | os.PathLike, variant: str | None = None, *, weights: bool = True
) -> tuple[Path, ControlNetConfig]:
    """The folder of a ControlNet, fetched from the Hub if it is a repository's name; its config.

    Without ``weights`` only the configuration is; else UserError unless the net is whole. Raises
    UserError if it is something else.
    """
    dotted = f".{variant}" if variant else ""
    files = (f"{_STEM}{dotted}.safetensors", f"{_STEM}*.safetensors.index*.json") if weights else ()
    folder = local_folder(path, ("config.json", *files), variant, weights=weights)
    config = read_json(folder / "config.json")
    kind = config.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel":
        raise UserError(f"{folder}: not a ControlNet but a {kind}")
    with error_context(folder):
        if not weights:
            return folder, read_config("controlnet", config)
        state = read_weights(folder, _STEM, variant)
        config = read_config("controlnet", config, state)
        check_fits("controlnet", state, config)
    return folder, config


def load_controlnet(
    path: str | os.PathLike, *, variant: str | None = None, dtype=jnp.float32
) -> ControlNet:
    """Read a ControlNet's folder, or a Hub repository of that name if there is no such folder.

    ``variant`` (as fp16) picks the weight files of that name; parameters are of ``dtype``
    whatever the files hold. Raises UserError naming the folder and what is wrong with it.
    """
    folder, config = find_controlnet(path, variant)
    return load_state("controlnet", read_weights(folder, _STEM, variant), config, dtype=dtype)


def save_controlnet(
    module: ControlNet, path: str | os.PathLike, *, force: bool = False, dtype: str | None = None
) -> None:
    """Write a folder that diffusers' ``ControlNetModel.from_pretrained`` opens.

    ``dtype`` (as float16) rounds the weights to that precision; else they keep theirs. Raises
    UserError if ``path`` exists, unless ``force`` is given and it was written here.
    """
    with output_folder(path, force=force) as folder:
        save_part(module, folder, _STEM, dtype)
