"""Files to flat PyTorch states. Nothing here knows what a tensor means.

Tensors come as memory maps: what is not used is not read. Sizes that a file claims are checked
against the file before anything is allocated.
"""

import json
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from fact_jax.errors import UserError

State = dict[str, np.ndarray]

DTYPES = {
    **{"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2")},
    **{"I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1")},
    **{"U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)},
}
"""The sorts of numbers that a safetensors file may hold, by the format's names."""
_JSON_LIMIT = 64 * 2**20
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Endings of files that ``torch.save`` wrote."""
_LEGACY_STEMS = {"model": "pytorch_model"}


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file of reasonable size."""
    path = Path(path)
    check_file(path)
    if path.stat().st_size > _JSON_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a JSON file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise UserError(f"{path}: not valid JSON ({err})") from err
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, an object was wanted")
    return value


def check_file(path: Path) -> None:
    """UserError unless ``path`` is a file that can be read."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def read_safetensors(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Tensors (read-only memory maps) and metadata of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    check_file(path)
    try:
        # The library checks the header: sizes, offsets, overlaps, dtypes against shapes.
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as err:
        raise UserError(f"{path}: not a whole safetensors file ({err})") from err
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    _check_names(path, header)
    start = 8 + length
    data = np.memmap(path, np.uint8, "r") if path.stat().st_size > start else b""
    state = {}
    for key, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {key} is {entry['dtype']}, which is not supported")
        begin, _ = entry["data_offsets"]
        state[key] = np.ndarray(entry["shape"], DTYPES[entry["dtype"]], data, start + begin)
    return state, metadata


def read_pickle(path: str | os.PathLike) -> State:
    """A flat state from a pickled PyTorch file, through the loader that runs no code."""
    path = Path(path)
    check_file(path)
    try:
        import torch
    except ImportError as err:
        raise UserError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install 'fact-jax[torch]'"
        ) from err
    import pickle
    import zipfile

    try:
        held = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except pickle.UnpicklingError as err:
        reason = re.search(r"(Unsupported \w+|Unsupported global: GLOBAL \S+|GLOBAL \S+)", str(err))
        raise UserError(
            f"{path}: refused, since it holds more than tensors and could run code"
            f"{f' ({reason[0]})' if reason else ''}; ask for it as safetensors"
        ) from err
    except Exception as err:  # a damaged file fails anywhere in the loader, with anything
        line = str(err).strip().splitlines()
        raise UserError(
            f"{path}: not a whole PyTorch file ({line[0] if line else type(err).__name__})"
        ) from err
    if isinstance(held, dict) and isinstance(held.get("state_dict"), dict):
        held = held["state_dict"]  # a trainer's other entries are no weights
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path}: holds no dictionary of tensors but a {type(held).__name__}")
    wrong = [str(k) for k, v in held.items() if not (isinstance(k, str) and torch.is_tensor(v))]
    if wrong:
        raise UserError(f"{path}: not a flat dictionary of tensors: {', '.join(map(ascii, wrong))}")
    _check_names(path, held)
    state = {}
    for key, tensor in held.items():
        try:
            state[key] = _from_torch(tensor)
        except (TypeError, RuntimeError) as err:
            raise UserError(f"{path}: {key} is {tensor.dtype}, {tensor.layout}: {err}") from err
    return state


def _check_names(path: Path, keys: Iterable[str]) -> None:
    # Keys are shown at the terminal: nothing in them may steer it.
    if odd := [key for key in keys if not key.isprintable()]:
        raise UserError(f"{path}: has keys that are no names: {', '.join(map(ascii, odd))}")


def _from_torch(tensor) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_file(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of one weight file, by its ending."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if path.suffix in PICKLES:
        return read_pickle(path), {}
    check_file(path)
    raise UserError(
        f"{path}: not a weight file that is known here (.safetensors, .ckpt, .pt, .bin)"
    )


def read_weights(folder: str | os.PathLike, stem: str, variant: str | None = None) -> State:
    """The weights of a diffusers or transformers model folder: safetensors, else legacy ``.bin``.

    ``stem`` is ``diffusion_pytorch_model`` or ``model``. One file or shards with their index;
    ``variant`` (as fp16) picks the files of that name.
    """
    folder = Path(folder)
    dotted = f".{variant}" if variant else ""
    wanted = []
    for base, suffix in ((stem, "safetensors"), (_LEGACY_STEMS.get(stem, stem), "bin")):
        single = folder / f"{base}{dotted}.{suffix}"
        index = folder / f"{base}.{suffix}.index{dotted}.json"
        if single.exists():
            return read_file(single)[0]
        if index.exists():
            return _read_shards(index)
        wanted += [single.name, index.name]
    there = sorted(
        {
            match[1] or "none"
            for file in (folder.iterdir() if folder.is_dir() else ())
            if (
                match := re.fullmatch(
                    rf"(?:{stem}|{_LEGACY_STEMS.get(stem, stem)})"
                    r"(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)",
                    file.name,
                )
            )
        }
    )
    hint = f"; there are weights of variant {', '.join(there)}" if there else ""
    raise UserError(f"{folder}: no {', no '.join(wanted)}{hint}")


def _read_shards(index: Path) -> State:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise UserError(f"{index}: has no weight_map from keys to files")
    state: State = {}
    for name in sorted(set(where.values())):
        if Path(name).name != name:
            raise UserError(f"{index}: names {name!r}, which is not a file of this folder")
        state |= read_file(index.parent / name)[0]
    missing, unexpected = sorted(set(where) - set(state)), sorted(set(state) - set(where))
    if missing or unexpected:
        raise UserError(
            f"{index}: does not fit its shards: {len(missing)} missing ({', '.join(missing)}); "
            f"{len(unexpected)} unexpected ({', '.join(unexpected)})"
        )
    return state


def local_folder(name: str | os.PathLike, patterns: Iterable[str], variant: str | None) -> Path:
    """``name`` itself if it is a folder, else the folder of the Hub repository of that name.

    ``patterns`` are the small files to fetch; of the weights only safetensors of the variant are.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: not a folder")
    if not _HUB_NAME.fullmatch(str(name)) or path.parent.exists():
        raise UserError(f"{path}: no such folder")
    from huggingface_hub import snapshot_download

    weights = [f"*/*.{variant}*safetensors"] if variant else ["*/*model*.safetensors"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=[*patterns, *weights]))
    except Exception as err:  # the client has a dozen sorts for offline, absent and forbidden
        line = str(err).strip().splitlines()
        raise UserError(
            f"{name}: no such folder here, and the Hub does not give it "
            f"({line[0] if line else type(err).__name__})"
        ) from err
