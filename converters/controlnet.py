"""A ControlNet as diffusers' folder, read and written."""

import os

import jax.numpy as jnp

from converters.pipeline import save_part
from converters.readers import local_folder, read_json, read_weights
from converters.weights import load_state
from converters.writers import whole_folder
from fact_jax.errors import UserError
from fact_jax.models.controlnet import ControlNet

_STEM = "diffusion_pytorch_model"


def load_controlnet(
    path: str | os.PathLike, *, variant: str | None = None, dtype=jnp.float32
) -> ControlNet:
    """Read a ControlNet's folder, or a Hub repository of that name if there is no such folder.

    ``variant`` (as fp16) picks the weight files of that name; parameters are of ``dtype``
    whatever the files hold. Raises UserError naming the folder and what is wrong with it.
    """
    dotted = f".{variant}" if variant else ""
    names = ("config.json", f"{_STEM}{dotted}.safetensors", f"{_STEM}*.safetensors.index*.json")
    folder = local_folder(path, names, variant)
    try:
        config = read_json(folder / "config.json")
        return load_state("controlnet", read_weights(folder, _STEM, variant), config, dtype=dtype)
    except UserError as err:
        where = "" if str(err).startswith(str(folder)) else f"{folder}: "
        raise UserError(f"{where}{err}") from err


def save_controlnet(
    module: ControlNet, path: str | os.PathLike, *, force: bool = False, dtype: str | None = None
) -> None:
    """Write a folder that diffusers' ``ControlNetModel.from_pretrained`` opens.

    ``dtype`` (as float16) rounds the weights to that precision; else they keep theirs. Raises
    UserError if ``path`` exists and ``force`` is not given.
    """
    with whole_folder(path, force=force) as folder:
        save_part(module, folder, _STEM, dtype)
