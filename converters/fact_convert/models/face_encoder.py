"""TransFace, the face encoder, as a file: the released ``.pt`` or a folder of ours."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp

from fact_convert.io.json_io import json_in, read_json, write_json
from fact_convert.io.lazy_tensor import State
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import read_file
from fact_convert.models.validation import RELEASED_SIZE, check_fits, encoder_shape
from fact_convert.weights import dump_state, load_state, read_config
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.utils.errors import UserError, error_context

log = logging.getLogger(__name__)

_RELEASED_HEADS = 8
_PUBLIC_WIDTHS = (256, 512, 768)


def load_encoder(path: str | os.PathLike, *, config=None, dtype=jnp.float32) -> TransFace:
    """Read a TransFace: a folder with ``config.json`` and ``model.safetensors``, or one file.

    The released ``.pt`` does not say its head count: it is taken to be 8 if it is of a public size,
    which is logged; any other file that does not say it needs ``config``. Parameters are of
    ``dtype``.
    """
    state, found = read_encoder(path, config)
    return load_state("transface", state, found, dtype=dtype)


def read_encoder(
    path: str | os.PathLike, config: Mapping | TransFaceConfig | None = None
) -> tuple[State, TransFaceConfig]:
    """A TransFace's tensors (memory maps) and its configuration, which fit; as load_encoder."""
    path, note = Path(path), None
    if path.is_dir():
        config = config or read_json(path / "config.json")
    state, text = read_file(path / "model.safetensors" if path.is_dir() else path)
    with error_context(path):
        if config is None:
            config = json_in(text, "configs", path).get("transface")
        if config is None:
            config, note = infer_encoder(state)
        found = read_config("transface", config, state)
        check_fits("transface", state, found)
    if note:
        log.warning("note: %s: %s", path, note)
    return state, found


def find_encoder_config(path: str | os.PathLike, width: int) -> tuple[TransFaceConfig, list[str]]:
    """The configuration of a TransFace, and what was assumed.

    Where there is no such file or folder it is that of the public one whose tokens are ``width``
    wide; UserError if there is none. No weights are needed.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return read_config("transface", read_json(path / "config.json")), []
    if path.is_file():
        return read_encoder(path)[1], []
    sizes = (TransFaceConfig.vit_s(), TransFaceConfig.vit_t(), TransFaceConfig.vit_l())
    config = next((size for size in sizes if size.embed_dim == width), None)
    if config is None:
        raise UserError(
            f"{path}: no config.json there, and no public TransFace is {width} wide, as the "
            "resampler's embedding_dim"
        )
    return config, [f"{path} is not here: a TransFace of width {width} is assumed"]


def infer_encoder(state: State) -> tuple[dict[str, int], str]:
    """A TransFace's configuration from its tensors, and a note on what is assumed.

    Their shapes do not tell the heads: UserError unless these are the widths of a public size.
    """
    found = encoder_shape(state)
    if found["embed_dim"] not in _PUBLIC_WIDTHS or found["img_size"] != RELEASED_SIZE:
        raise UserError(
            f"no configuration is there, and the tensors of this TransFace of width "
            f"{found['embed_dim']} do not tell its heads (the public ones, which have "
            f"{_RELEASED_HEADS}, are {', '.join(map(str, _PUBLIC_WIDTHS))} wide): give its folder "
            "with config.json"
        )
    note = f"transface: num_heads {_RELEASED_HEADS} taken, as in the public ones of this width"
    return {**found, "num_heads": _RELEASED_HEADS}, note


def save_encoder(module: TransFace, path: str | os.PathLike) -> None:
    """Write a TransFace as a folder with ``config.json`` and ``model.safetensors``."""
    path = Path(path)
    config: TransFaceConfig = module.config
    write_safetensors(path / "model.safetensors", dump_state(module), {"format": "pt"})
    write_json(path / "config.json", {"model_type": "transface", **config.to_dict()})
