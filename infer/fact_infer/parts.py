"""Where the parts of a pipeline lie: files, folders, or repositories on the Hub.

The folder that ``save_face_files`` writes, like a repository with the same in it, holds
``adapter.safetensors``, ``encoder/config.json`` and ``encoder/model.safetensors``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from fact_convert.io.json_io import write_json
from fact_convert.io.safetensors_io import write_safetensors
from fact_convert.io.weight_files import file_format
from fact_convert.models.adapter import write_adapter
from fact_infer.base_model import (
    Base,
    FaceFiles,
    check_controlnet,
    check_fit,
    read_base,
    read_face_files,
)
from fact_jax.utils.errors import UserError

ADAPTER, ENCODER = "adapter.safetensors", "encoder"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# OWNER/REPOSITORY, and perhaps a path in it.
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/([\w./-]+))?")


def find_face_files(
    adapter: str | os.PathLike, encoder: str | os.PathLike | None = None
) -> tuple[Path, Path]:
    """The adapter's file, and the encoder's file or folder.

    Each may be a path, or ``OWNER/REPOSITORY`` or ``OWNER/REPOSITORY/PATH/IN/IT`` on the Hub. Where
    ``encoder`` is None it lies in the folder ``encoder`` beside the adapter. Raises UserError if
    there is no such thing.
    """
    found = _locate(adapter, (ADAPTER,), beside=f"{ENCODER}/*" if encoder is None else None)
    found = found / ADAPTER if found.is_dir() else found
    if not found.exists():
        raise UserError(f"{adapter}: holds no {ADAPTER}")
    if encoder is not None:
        return found, _locate(encoder, (CONFIG, WEIGHTS))
    if not (found.parent / ENCODER / WEIGHTS).exists():
        raise UserError(f"{adapter}: no {ENCODER}/{WEIGHTS} beside it: name the encoder too")
    return found, found.parent / ENCODER


def has_encoder(adapter: str | os.PathLike) -> bool:
    """Whether an encoder lies beside an adapter; one that is not here is taken to have it."""
    path = Path(adapter)
    folder = path if path.is_dir() else path.parent
    return not path.exists() or (folder / ENCODER / WEIGHTS).exists()


def open_parts(
    base: str | os.PathLike | Base,
    adapter: str | os.PathLike | None,
    encoder: str | os.PathLike | None,
    *,
    face: FaceFiles | None,
    controlnet: str | os.PathLike | None,
) -> tuple[Base, FaceFiles | None]:
    """What a pipeline is made of, by name or opened already; UserError unless it fits together.

    No weights are read: of the adapter and the encoder there are memory maps.
    """
    base = base if isinstance(base, Base) else read_base(base)
    if face is None and adapter is not None:
        face = read_face_files(*find_face_files(adapter, encoder))
    if face is not None:
        check_fit(base, face)
    if controlnet is not None:
        check_controlnet(base, controlnet)
    return base, face


def _locate(name: str | os.PathLike, files: Sequence[str], beside: str | None = None) -> Path:
    """The file or folder of that name; of a repository only ``files``, or one, are fetched."""
    path = Path(name)
    if path.exists():
        return path
    match = _HUB_NAME.fullmatch(str(name))
    if not match or Path(path.parts[0]).exists():
        raise UserError(f"{path}: no such file or folder")
    repository, inner = match[1], PurePosixPath(match[2] or ".")
    if file_format(inner) is not None:
        folder, files = inner.parent, (inner.name,)
    else:
        folder = inner
    wanted = [str(folder / file) for file in (*files, *([beside] if beside else ()))]
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(repository, allow_patterns=wanted)) / inner
    except Exception as error:  # the client has a dozen sorts for offline, absent and forbidden
        line = str(error).strip().splitlines()
        raise UserError(
            f"{name}: no such file or folder here, and the Hub does not give it "
            f"({line[0] if line else type(error).__name__})"
        ) from error
    if not found.exists():
        raise UserError(f"{name}: the repository {repository} holds no {inner}")
    return found


def save_face_files(
    files: FaceFiles, folder: str | os.PathLike, config: Mapping[str, object]
) -> None:
    """Write both as ``find_face_files`` finds them; ``config`` is what the adapter fits."""
    folder = Path(folder)
    write_adapter(folder / ADAPTER, files.adapter_state, config, files.metadata)
    write_safetensors(folder / ENCODER / WEIGHTS, files.encoder_state, {"format": "pt"})
    encoder = {"model_type": "transface", **files.encoder_config.to_dict()}
    write_json(folder / ENCODER / CONFIG, encoder)
