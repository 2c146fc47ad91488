"""TransFace, the face encoder, as a file: the released ``.pt`` or a folder of ours."""

import math
import os
import re
from pathlib import Path

import jax.numpy as jnp

from converters.readers import State, read_file, read_json
from converters.weights import dump_state, load_state
from converters.writers import write_json, write_safetensors
from fact_jax.errors import UserError
from fact_jax.models.transface import TransFace, TransFaceConfig

_RELEASED_SIZE = 112
_RELEASED_HEADS = 8


def load_encoder(path: str | os.PathLike, *, config=None, dtype=jnp.float32) -> TransFace:
    """Read a TransFace: a folder with ``config.json`` and ``model.safetensors``, or one file.

    A single file (the released ``.pt``) does not say its head count: it is taken to be 8, as in
    all public sizes, unless ``config`` says more. Parameters are of ``dtype``.
    """
    path = Path(path)
    if path.is_dir():
        config = config or read_json(path / "config.json")
        state, _ = read_file(path / "model.safetensors")
    else:
        state, _ = read_file(path)
    try:
        return load_state("transface", state, config or infer_encoder(state), dtype=dtype)
    except UserError as err:
        raise UserError(f"{path}: {err}") from err


def infer_encoder(state: State) -> dict[str, int]:
    """A TransFace's configuration from its tensors' shapes, with the public sizes' 8 heads."""
    try:
        _, tokens, dim = state["pos_embed"].shape
        patch = state["patch_embed.proj.weight"].shape[-1]
        classes = state["feature.2.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as err:
        raise UserError(f"not a TransFace model ({err} is missing or misshapen)") from err
    side = math.isqrt(tokens)
    # 112 is no whole number of patches of 9: the tokens alone do not give the picture's size.
    released = _RELEASED_SIZE // patch == side
    depth = {int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))}
    return {
        "img_size": _RELEASED_SIZE if released else side * patch,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len(depth),
        "num_heads": _RELEASED_HEADS,
        "num_classes": classes,
    }


def save_encoder(module: TransFace, path: str | os.PathLike) -> None:
    """Write a TransFace as a folder with ``config.json`` and ``model.safetensors``."""
    path = Path(path)
    config: TransFaceConfig = module.config
    write_safetensors(path / "model.safetensors", dump_state(module), {"format": "pt"})
    write_json(path / "config.json", {"model_type": "transface", **config.to_dict()})
