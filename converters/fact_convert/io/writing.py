"""Flat PyTorch states to files: safetensors and JSON, whole or not at all."""

import concurrent.futures
import contextlib
import json
import math
import os
import pickle
import struct
import threading
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fact_convert.io.hashing import CONTENT, describe, digest, hash_of
from fact_convert.io.lazy_tensor import Lazy, contiguous, fetch, release
from fact_convert.io.parallel import in_threads
from fact_convert.io.reading import DTYPES
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import atomic_write

STORAGES = {
    **{np.dtype("f8"): "DoubleStorage", np.dtype("f4"): "FloatStorage"},
    **{np.dtype("f2"): "HalfStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"},
    **{np.dtype("i8"): "LongStorage", np.dtype("i4"): "IntStorage", np.dtype("i2"): "ShortStorage"},
    **{np.dtype("i1"): "CharStorage", np.dtype("u1"): "ByteStorage", np.dtype(bool): "BoolStorage"},
}
"""What PyTorch's pickles call the numbers of each sort."""
_THREAD = threading.local()
_PIECE = 1 << 18
"""At once, as ``cp`` does. For more, Linux looks for larger pages, and may look for long."""
_DONTCACHE = 0x80
"""Linux' RWF_DONTCACHE, since 6.14: what is written goes to disk at once and leaves the cache."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray | Lazy],
    metadata: Mapping[str, str],
    wrote: Callable[[int], None] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a safetensors file in the order that the format's library has.

    Tensors are read, turned and written a few at a time, wherever they come from. The hash of the
    content joins the metadata. ``wrote`` is called with the number of bytes of every tensor.
    Without ``replace``, UserError if the file is there already.
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

    turn = threading.Lock()  # threads that write to one file at once wait without sleeping

    def write(key: str) -> str:
        array = in_order(state[key])
        line = describe(key, array, digest(array))
        with turn:
            write_at(handle, array, start + header[key]["data_offsets"][0], flags)
        return line

    with (
        atomic_write(path, replace=replace) as temporary,
        open(temporary, "wb") as handle,
        # Whatever happens, the threads are done before their file is closed.
        contextlib.closing(in_threads(write, keys, lambda key: fetch(state[key]))) as written,
        concurrent.futures.ThreadPoolExecutor(1) as beside,
    ):
        handle.truncate(start + end)
        flags = _past_the_cache(handle)
        lines, flushed = [], beside.submit(int)
        for key, line in zip(keys, written, strict=True):
            lines.append(line)
            if flushed.done():  # the disk works all the while, not only at the end
                flushed.result()
                flushed = beside.submit(os.fdatasync, handle.fileno())
            if wrote is not None:
                wrote(state[key].nbytes)
        flushed.result()
        header["__metadata__"][CONTENT] = hash_of(lines)
        handle.write(struct.pack("<Q", start - 8) + text())


def _name(path: str | os.PathLike, key: str, dtype: np.dtype) -> str:
    if dtype not in _NAMES:
        raise UserError(f"{path}: {key} is {dtype}, which the format does not have")
    return _NAMES[dtype]


def in_order(array: np.ndarray | Lazy) -> np.ndarray:
    """The numbers of a stored array in C order, until the next call in the same thread."""
    stored = np.asarray(array)
    if stored.flags.c_contiguous:
        return stored
    if len(getattr(_THREAD, "room", b"")) < stored.nbytes:
        _THREAD.room = np.empty(stored.nbytes, np.uint8)  # new memory costs as much as the copy
    room = _THREAD.room[: stored.nbytes].view(stored.dtype).reshape(stored.shape)
    copied = contiguous(stored, out=room)
    release(stored)
    return copied


def write_at(handle, array: np.ndarray, offset: int, flags: int = 0) -> None:
    """Write an array in C order at a place in an open file, from any thread."""
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = os.pwritev(handle.fileno(), [rest[:_PIECE]], offset, flags)
        rest, offset = rest[count:], offset + count
    release(array)


def _past_the_cache(handle) -> int:
    """The flag that has Linux keep nothing of a file in memory, 0 where it cannot.

    To find room for a file of gigabytes takes the system longer than to write it.
    """
    try:
        os.pwritev(handle.fileno(), [b"0"], 0, _DONTCACHE)
    except (OSError, NotImplementedError, AttributeError):  # an older Linux, another system
        return 0
    return _DONTCACHE


def write_pickle(
    path: str | os.PathLike,
    state: Mapping[str, np.ndarray | Lazy],
    wrote: Callable[[int], None] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a flat state as ``torch.save`` does, one tensor after the other.

    Equal states give equal bytes, whatever the file is called and whenever it is written. Without
    ``replace``, UserError if the file is there already.
    """
    folder = "archive"  # as torch.save calls it where the file has no name
    with (
        atomic_write(path, replace=replace) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        archive.writestr(zipfile.ZipInfo(f"{folder}/data.pkl"), _pickled(path, state))
        archive.writestr(zipfile.ZipInfo(f"{folder}/byteorder"), "little")
        for number, stored in enumerate(state.values()):
            array = in_order(stored)
            entry = zipfile.ZipInfo(f"{folder}/data/{number}")
            # A field without a meaning, so long that the numbers begin at a multiple of 64.
            begin = archive.fp.tell() + 30 + len(entry.filename.encode()) + 4
            entry.extra = struct.pack("<2sH", b"FB", -begin % 64) + b"Z" * (-begin % 64)
            with archive.open(entry, "w") as member:
                member.write(memoryview(array.reshape(-1).view(np.uint8)))
            release(array)
            if wrote is not None:
                wrote(array.nbytes)
        archive.writestr(zipfile.ZipInfo(f"{folder}/version"), "3\n")


def _pickled(path: str | os.PathLike, state: Mapping[str, np.ndarray | Lazy]) -> bytes:
    """The pickle that names the tensors: for each one a call that builds it from its storage."""

    def plain(value: str | int | tuple[int, ...]) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    parts = [pickle.PROTO + b"\x02" + pickle.EMPTY_DICT]
    for number, (key, array) in enumerate(state.items()):
        if array.dtype not in STORAGES:
            raise UserError(f"{path}: {key} is {array.dtype}, which the format does not have")
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        storage = (plain("storage"), named("torch", STORAGES[array.dtype]), plain(str(number)))
        storage = (*storage, plain("cpu"), plain(array.size))
        built = (pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID, plain(0))
        built = (*built, plain(array.shape), plain(tuple(strides)), pickle.NEWFALSE)
        hooks = (named("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE)
        call = (named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK, *built, *hooks)
        parts += [plain(key), *call, pickle.TUPLE, pickle.REDUCE, pickle.SETITEM]
    return b"".join([*parts, pickle.STOP])


def write_json(path: str | os.PathLike, value: Mapping) -> None:
    """Write a JSON object, indented."""
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
