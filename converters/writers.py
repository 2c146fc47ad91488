"""Flat PyTorch states to files: safetensors and JSON, whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from converters.readers import DTYPES
from fact_jax.errors import UserError
from fact_jax.files import atomic_write

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file, tensor by tensor, in the order that the format's library has.

    ``wrote`` is called with the number of bytes of every tensor.
    """
    keys = sorted(state, key=lambda key: (-state[key].dtype.itemsize, key))
    header: dict = {"__metadata__": dict(metadata)}
    end = 0
    for key in keys:
        array, begin = state[key], end
        end += array.nbytes
        header[key] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            handle.write(np.ascontiguousarray(state[key]).reshape(-1).view(np.uint8).data)
            if wrote is not None:
                wrote(state[key].nbytes)


def write_pickle(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray],
    wrote: Callable[[int], None] | None = None,
) -> None:
    """Write a flat state as ``torch.save`` does. Needs PyTorch."""
    try:
        import torch
    except ImportError as err:
        raise UserError(
            f"{path}: writing this file needs PyTorch: pip install 'fact-jax[torch]'"
        ) from err

    def tensor(array: np.ndarray):
        array = np.array(array, order="C", copy=True)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with atomic_write(path) as temporary:
        torch.save({key: tensor(array) for key, array in state.items()}, temporary)
    if wrote is not None:
        wrote(sum(array.nbytes for array in state.values()))


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Write a JSON object, indented."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, *, force: bool) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` that becomes ``path`` when all went well.

    Raises UserError if ``path`` is there already, unless ``force``: then it is replaced at the
    end, and an exception leaves it as it was.
    """
    path = Path(path)
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{path}: exists already; choose another name, or force it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            old = path.with_name(f".{path.name}.{secrets.token_hex(4)}.old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
