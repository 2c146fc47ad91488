"""Safetensors files: every size that a file claims is compared with its bytes before it is used."""

import contextlib
import json
import math
import os
import re
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fact_convert.io.hashing import CONTENT, check_content, combined_sha256, tensor_line
from fact_convert.io.json_io import JSON_LIMIT, check_file, check_names, parse_json
from fact_convert.io.lazy_tensor import State, in_c_order, pwrite_array
from fact_convert.io.parallel import thread_map
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

DTYPES = {
    **{"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2")},
    **{"I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1")},
    **{"U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
}
"""The sorts of numbers that a safetensors file may hold, by the format's names."""
MOST_AXES = 32


def read_safetensors(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Tensors (read-only memory maps) and metadata of a safetensors file.

    Those that were written here are compared with the hash that they carry.
    """
    path = Path(path)
    check_file(path)
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        first = handle.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > size - 8:
            raise UserError(f"{path}: not a whole safetensors file (its header is cut off)")
        if length > JSON_LIMIT:
            raise UserError(f"{path}: a header of {length} bytes is too much")
        header = parse_json(path, handle.read(length))
    metadata = _metadata(path, header.pop("__metadata__", {}))
    check_names(path, header)
    start = 8 + length
    _check_layout(path, header, size - start)
    data = np.memmap(path, np.uint8, "r") if size > start else b""
    state = {}
    for key, entry in header.items():
        dtype = DTYPES[entry["dtype"]]
        begin, end = entry["data_offsets"]
        try:
            empty = begin == end
            state[key] = np.ndarray(entry["shape"], dtype, None if empty else data, start + begin)
        except ValueError as err:  # a huge axis beside one of nothing
            raise UserError(f"{path}: {key} is of shape {entry['shape']}: {err}") from err
    check_content(path, state, metadata)
    return state, metadata


def _metadata(path: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(map(_is_text, (*found, *found.values()))):
        raise UserError(f"{path}: its metadata is not a table of texts")
    return found


def _is_text(value: object) -> bool:
    """Whether UTF-8 has it: JSON may hold half a character of UTF-16."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _check_layout(path: Path, header: Mapping, size: int) -> None:
    """Every byte of the data belongs to one tensor, which has just as many as its shape needs."""
    spans = []
    for key, entry in header.items():
        fits = isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}
        if not fits or not (_counts(entry["shape"]) and _counts(entry["data_offsets"])):
            raise UserError(f"{path}: not a whole safetensors file ({key} is not described)")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {key} is {entry['dtype']!a}, which is not supported")
        if len(entry["data_offsets"]) != 2 or len(entry["shape"]) > MOST_AXES:
            raise UserError(f"{path}: not a whole safetensors file ({key} is not described)")
        begin, end = entry["data_offsets"]
        needs = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if end - begin != needs:
            raise UserError(
                f"{path}: not a whole safetensors file ({key} of shape {entry['shape']} needs "
                f"{needs} bytes and has those from {begin} to {end})"
            )
        spans.append((begin, end, key))
    reached = 0
    for begin, end, key in sorted(spans):
        if begin != reached:
            raise UserError(
                f"{path}: not a whole safetensors file ({key} begins at {begin}, not {reached})"
            )
        reached = end
    if reached != size:
        raise UserError(
            f"{path}: not a whole safetensors file (its tensors are {reached} bytes, it has {size})"
        )


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike,
    state: State,
    metadata: Mapping[str, str],
    *,
    replace: bool = True,
) -> None:
    """Write a safetensors file in the order that the format's library has.

    Tensors are read, turned and written a few at a time, wherever they come from. The hash of the
    content joins the metadata.
    Without ``replace``, UserError if the file is there already.
    """
    keys = sorted(state, key=lambda key: (-state[key].dtype.itemsize, key))
    hole = "0" * len(combined_sha256([]))
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

    turn = threading.Lock()  # threads that write to one file at once wait for each other anyway

    def write(key: str) -> str:
        array = in_c_order(state[key])
        line = tensor_line(key, array)
        with turn:
            pwrite_array(handle, array, start + header[key]["data_offsets"][0], uncached=True)
        return line

    with (
        atomic_write(path, replace=replace) as temporary,
        open(temporary, "wb") as handle,
        # Whatever happens, the threads are done before their file is closed.
        contextlib.closing(thread_map(write, keys)) as written,
    ):
        handle.truncate(start + end)
        header["__metadata__"][CONTENT] = combined_sha256(written)
        handle.write(struct.pack("<Q", start - 8) + text())


def _name(path: str | os.PathLike, key: str, dtype: np.dtype) -> str:
    if dtype not in _NAMES:
        raise UserError(f"{path}: {key} is {dtype}, which the format does not have")
    return _NAMES[dtype]
