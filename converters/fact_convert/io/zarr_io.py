"""Orbax's on-disk format of a pytree: one Zarr array a leaf, and ``_METADATA``.

Orbax itself packs and compresses them, and reads or writes a whole tree. Here they are read leaf
by leaf, whoever wrote them, and written leaf by leaf as plain files, which Orbax reads too and
which can be mapped into memory.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fact_convert.io.json_io import read_json
from fact_convert.io.lazy_tensor import LazyTensor, State, Tensor, in_c_order, pwrite_array
from fact_convert.io.parallel import thread_map
from fact_convert.io.safetensors_io import DTYPES, MOST_AXES
from fact_jax.utils.errors import UserError, first_line

_SMALL, _MOST_PACKED = 2**30, 64
"""Zeros pack far better than weights do: of more bytes than the first, what unpacks to more than so
many times its size is not a checkpoint."""


def read_tree(folder: Path, weights: str, sums: Mapping[str, int] | None = None) -> State:
    """The leaves under ``weights`` (or under ``params`` if there are none) by dotted path.

    ``sums`` are checksums by path with slashes, beginning with ``weights``. Raises UserError if
    the folder is damaged; numbers that are damaged show when a leaf is read.
    """
    about = read_json(folder / "_METADATA")
    names = list(_names(folder, about))
    root = weights if any(name[0] == weights for name in names) else "params"
    chosen = [name for name in names if name[0] == root]
    opened = _open(folder, [".".join(name) for name in chosen], bool(about.get("use_zarr3")))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    declared = sum(array.nbytes for array in opened)
    if declared > _SMALL + _MOST_PACKED * size:
        raise UserError(f"{folder}: damaged, {size} bytes cannot hold the {declared} it claims")
    sums = sums if isinstance(sums, Mapping) else {}
    return {
        ".".join(name[1:]): _checked(folder, name, array, sums.get("/".join(name)))
        for name, array in zip(chosen, opened, strict=True)
    }


def _names(folder: Path, about: Mapping) -> Iterator[tuple[str, ...]]:
    try:
        for leaf in about["tree_metadata"].values():
            if leaf["value_metadata"]["value_type"] == "None":
                continue
            name = tuple(str(part["key"]) for part in leaf["key_metadata"])
            if not name or not all(part.isprintable() and "/" not in part for part in name):
                raise UserError(f"{folder}: has leaves that are no names: {name!r}")
            yield name
    except (AttributeError, KeyError, TypeError) as err:
        raise UserError(f"{folder}: damaged, _METADATA does not list its leaves") from err


def _open(folder: Path, names: list[str], zarr3: bool) -> Sequence[Tensor]:
    """Open the leaves without reading them."""
    packed = (folder / "manifest.ocdbt").exists()
    if not packed and not zarr3:
        mapped = [array for name in names if (array := _map(folder, name)) is not None]
        if len(mapped) == len(names):
            return mapped
    import tensorstore

    base = str(folder.resolve())
    context = tensorstore.Context()

    def opened(name: str) -> tensorstore.Future:
        store = {"driver": "file", "path": f"{base}/{name}/"}
        if packed:
            store = {"driver": "ocdbt", "base": f"file://{base}/", "path": f"{name}/"}
        spec = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": store,
            "fill_missing_data_reads": False,
        }
        return tensorstore.open(spec, open=True, read=True, context=context)

    def leaf(store: tensorstore.TensorStore, dtype: np.dtype) -> LazyTensor:
        return LazyTensor(store.shape, dtype, lambda: store.read().result())

    arrays = []
    for name, future in [(name, opened(name)) for name in names]:
        try:
            store = future.result()
        except Exception as err:  # tensorstore's are of several types
            raise UserError(
                f"{folder}: damaged, {name} cannot be read ({first_line(err):.200})"
            ) from err
        dtype = store.dtype.numpy_dtype
        if dtype not in DTYPES.values():
            raise UserError(f"{folder}: {name} is {dtype}, which is not supported")
        arrays.append(leaf(store, dtype))
    return arrays


def _map(folder: Path, name: str) -> np.ndarray | None:
    """Memory map of a leaf stored as one uncompressed chunk; None if it is not."""
    file = folder / name / ".zarray"
    if not file.exists():
        raise UserError(f"{folder}: damaged, {name} is not there")
    about = read_json(file)
    shape, dtype = about.get("shape"), _DTYPES.get(str(about.get("dtype")))
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
        raise UserError(f"{folder}: damaged, {name} has no shape")
    plain = about.get("compressor") is None and not about.get("filters")
    whole = about.get("chunks") == [max(1, n) for n in shape]
    if not whole or not plain or about.get("order") != "C" or dtype is None:
        return None
    size = math.prod(shape) * dtype.itemsize
    chunk = file.with_name(".".join("0" for _ in shape) or "0")
    if size == 0 and len(shape) <= MOST_AXES and max(shape) < 2**31:
        return np.zeros(shape, dtype)
    if chunk.is_symlink() or not chunk.is_file() or chunk.stat().st_size != size:
        raise UserError(f"{folder}: damaged, {name} is not a file of {size} bytes")
    return np.memmap(chunk, dtype, "r", shape=tuple(shape))


def _checked(folder: Path, name: tuple[str, ...], array: Tensor, known: int | None) -> Tensor:
    def read() -> np.ndarray:
        try:
            found = np.asarray(array)
        except Exception as err:  # tensorstore's are of several types
            path = ".".join(name[1:])
            raise UserError(
                f"{folder}: damaged, {path} cannot be read ({first_line(err):.200})"
            ) from err
        # Orbax itself hands out changed bytes without a word.
        if known is not None and known != checksum(found):
            raise UserError(f"{folder}: damaged, not what was written: {'.'.join(name[1:])}")
        return found

    return LazyTensor(array.shape, array.dtype, read)


def write_tree(folder: Path, tree: Mapping) -> dict[str, int]:
    """Write nested arrays; the checksum of every leaf by its path. A leaf may be None."""
    leaves = dict(_flatten(tree))
    stored = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    folder.mkdir()

    def write(name: tuple[str, ...]) -> int:
        return _write_leaf(folder / ".".join(name), stored[name])

    with contextlib.closing(thread_map(write, list(stored))) as written:
        sums = {"/".join(name): found for name, found in zip(stored, written, strict=True)}
    about = {
        "tree_metadata": {str(name): _leaf_metadata(name, leaves[name]) for name in leaves},
        "use_ocdbt": False,
        "use_zarr3": False,
    }
    (folder / "_METADATA").write_text(json.dumps(about), encoding="utf-8")
    return sums


def _flatten(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Tensor | None]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, (*path, key))
        else:
            yield (*path, key), value


def _leaf_metadata(name: tuple[str, ...], value: Tensor | None) -> dict:
    kind = "None" if value is None else "np.ndarray"
    return {
        "key_metadata": [{"key": key, "key_type": 2} for key in name],
        "value_metadata": {"value_type": kind, "skip_deserialize": value is None},
    }


def _write_leaf(folder: Path, stored: Tensor) -> int:
    array = in_c_order(stored)
    found = checksum(array)
    folder.mkdir()
    about = {
        "zarr_format": 2,
        "shape": list(array.shape),
        "chunks": [max(1, n) for n in array.shape],
        "dtype": _ZARR_NAMES[array.dtype],
        "order": "C",
        "dimension_separator": ".",
        "compressor": None,
        "filters": None,
        "fill_value": None,
    }
    # Whoever wants the whole tree on disk syncs it as a whole: a journal for each file is slow.
    (folder / ".zarray").write_text(json.dumps(about), encoding="utf-8")
    if array.nbytes:
        with open(folder / (".".join("0" for _ in array.shape) or "0"), "wb") as handle:
            pwrite_array(handle, array, 0)
    return found


_ZARR_NAMES = {
    dtype: dtype.str if dtype.isbuiltin == 1 else dtype.name for dtype in DTYPES.values()
}
_DTYPES = {name: dtype for dtype, name in _ZARR_NAMES.items()}

_ROWS, _COLUMNS = 16, 1 << 13
_ODD = 2 * np.arange(_COLUMNS, dtype=np.uint32) + 1
_EVEN = 2 * _COLUMNS * np.arange(_ROWS, dtype=np.uint32)


def checksum(array: np.ndarray) -> int:
    """The 32-bit sum that the trainer stores of a leaf: its words, each times an odd number.

    In blocks that the cache holds, by the sums of their rows and columns.
    """
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{array.dtype.itemsize}")
    total, size = 0, _ROWS * _COLUMNS
    for start in range(0, words.size, size):
        block = words[start : start + size]
        if block.size < size:
            block = np.pad(block, (0, size - block.size))
        block = block.reshape(_ROWS, _COLUMNS)
        rows, columns = (block.sum(axis, dtype=np.uint32) for axis in (1, 0))
        factors = _EVEN + np.uint32(2 * start % 2**32)
        total += int((columns * _ODD).sum(dtype=np.uint32)) + int(
            (rows * factors).sum(dtype=np.uint32)
        )
    return total % 2**32
