"""JSON and safetensors files, believed only after they were checked.

Whatever a file says of itself is compared with the bytes that there are before it is used.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fact_convert.io.hashing import check_content
from fact_convert.io.lazy_tensor import Lazy
from fact_jax.utils.errors import UserError, listed

State = dict[str, np.ndarray | Lazy]

DTYPES = {
    **{"F64": np.dtype("f8"), "F32": np.dtype("f4"), "F16": np.dtype("f2")},
    **{"I64": np.dtype("i8"), "I32": np.dtype("i4"), "I16": np.dtype("i2"), "I8": np.dtype("i1")},
    **{"U64": np.dtype("u8"), "U32": np.dtype("u4"), "U16": np.dtype("u2"), "U8": np.dtype("u1")},
    **{"BF16": np.dtype(ml_dtypes.bfloat16), "BOOL": np.dtype(bool)},
    **{"F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2)},
}
"""The sorts of numbers that a safetensors file may hold, by the format's names."""
_JSON_LIMIT = 16 * 2**20
MOST_AXES = 32


def check_file(path: Path) -> None:
    """UserError unless ``path`` is a file that can be read."""
    try:
        there = path.exists()
    except (OSError, ValueError) as err:
        raise UserError(f"{str(path)!a}: not a name that files have") from err
    if not there:
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: no permission to read it")


def read_json(path: str | os.PathLike) -> dict:
    """A JSON object from a file of reasonable size."""
    return _parse(Path(path), _read_small(Path(path), "JSON"))


def read_text(path: str | os.PathLike) -> str:
    """A text file of reasonable size, in UTF-8."""
    try:
        return _read_small(Path(path), "text").decode("utf-8")
    except UnicodeDecodeError as err:
        raise UserError(f"{path}: not UTF-8 text ({err})") from err


def _read_small(path: Path, sort: str) -> bytes:
    check_file(path)
    with open(path, "rb") as handle:
        data = handle.read(_JSON_LIMIT + 1)
    if len(data) > _JSON_LIMIT:
        raise UserError(f"{path}: {path.stat().st_size} bytes are too many for a {sort} file")
    return data


def _parse(path: Path, data: bytes) -> dict:
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as err:
        raise UserError(f"{path}: not valid JSON ({err})") from err
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, an object was wanted")
    return value


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


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
        if length > _JSON_LIMIT:
            raise UserError(f"{path}: a header of {length} bytes is too much")
        header = _parse(path, handle.read(length))
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
    texts = found if isinstance(found, dict) else {"": None}
    try:
        for text in (*texts, *texts.values()):
            text.encode()
    except (AttributeError, UnicodeEncodeError) as err:
        raise UserError(f"{path}: its metadata is not a table of texts") from err
    return texts


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


def check_names(path: Path, keys: Iterable[str]) -> None:
    """Keys are shown at the terminal: nothing in them may steer it."""
    if odd := [key for key in keys if not key.isprintable()]:
        raise UserError(f"{path}: has keys that are no names: {listed(map(ascii, odd))}")
