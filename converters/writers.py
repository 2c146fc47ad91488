"""Flat PyTorch states to files: safetensors and JSON, whole or not at all."""

import contextlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from converters.arrays import Lazy, contiguous, release
from converters.content import describe, digest, hash_of
from converters.parallel import in_threads
from converters.readers import DTYPES
from fact_jax.errors import UserError
from fact_jax.files import atomic_write, sync

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CONTENT = "content"
"""Where a file's metadata says what it holds: the ``content_hash`` of its tensors."""


def write_safetensors(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray | Lazy],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file in the order that the format's library has.

    Tensors are read, turned and written a few at a time, wherever they come from. The hash of the
    content joins the metadata. ``wrote`` is called with the number of bytes of every tensor.
    """
    keys = sorted(state, key=lambda key: (-state[key].dtype.itemsize, key))
    hole = "0" * len(hash_of([]))
    header: dict = {"__metadata__": {**metadata, CONTENT: hole}}
    end = 0
    for key in keys:
        array, begin = state[key], end
        end += array.nbytes
        header[key] = {
            "dtype": _name(path, key, array.dtype),
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }

    def text() -> bytes:
        found = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        return found + b" " * (-len(found) % 8)

    start = 8 + len(text())

    def write(key: str) -> str:
        array = in_order(state[key])
        write_at(handle, array, start + header[key]["data_offsets"][0])
        return describe(key, array, digest(array))

    with atomic_write(path) as temporary, open(temporary, "wb") as handle:
        handle.truncate(start + end)
        lines = []
        for key, line in zip(keys, in_threads(write, keys), strict=True):
            lines.append(line)
            if wrote is not None:
                wrote(state[key].nbytes)
        header["__metadata__"][CONTENT] = hash_of(lines)
        handle.write(struct.pack("<Q", start - 8) + text())


def _name(path: str | os.PathLike, key: str, dtype: np.dtype) -> str:
    if dtype not in _NAMES:
        raise UserError(f"{path}: {key} is {dtype}, which the format does not have")
    return _NAMES[dtype]


def in_order(array: np.ndarray | Lazy) -> np.ndarray:
    """The numbers of a stored array in C order; of mapped files they take no memory for long."""
    stored = np.asarray(array)
    if stored.flags.c_contiguous:
        return stored
    copied = contiguous(stored)
    release(stored)
    return copied


def write_at(handle, array: np.ndarray, offset: int) -> None:
    """Write an array in C order at a place in an open file, from any thread."""
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = os.pwrite(handle.fileno(), rest, offset)
        rest, offset = rest[count:], offset + count
    release(array)


