"""PyTorch checkpoint files: read by torch.load(weights_only=True), written without torch.

The pickle in such a file says where each tensor's numbers lie. The archive around it is checked
first, so that nothing is unpacked; and afterwards every tensor is compared with the archive, since
the loader believes the pickle. Trainers store objects of their own classes beside the tensors:
these are never imported, what stands for them only holds what the file says.
"""

import math
import os
import pickle
import re
import struct
import sys
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fact_convert.io.file_types import FAMILIES_KNOWN, foreign_family
from fact_convert.io.json_io import check_file, check_names
from fact_convert.io.lazy_tensor import State, in_c_order, release
from fact_convert.io.parallel import thread_map
from fact_convert.io.safetensors_io import DTYPES
from fact_jax.utils.errors import UserError, first_line, listed
from fact_jax.utils.files import atomic_write

_PICKLE_LIMIT = 16 * 2**20
_BLOCK = 2**25
_LOCAL = struct.Struct("<4s22xHH")
_DATA_MODULES = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions"}
_DATA_MODULES |= {"functools", "pathlib", "types", "typing", "uuid"}
_DATA_TYPES = {"bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object"}
_DATA_TYPES |= {"range", "set", "slice", "str", "tuple", "type"}
"""Of Python's own names those that trainers' files hold; the others have no business in one."""
_OLD_MODULES = {"__builtin__", "commands"}
"""Python 2's names of modules, which pickles use: ``commands`` is subprocess."""
_FOLDER = 0x10
"""In DOS' attributes. PyTorch, unless it maps a file, gives such a record any numbers at all."""


def read_torch_file(path: str | os.PathLike) -> tuple[State, dict[str, str]]:
    """Tensors and metadata of a PyTorch file: the whole of it, or its ``state_dict``.

    Tensors are memory maps, except in files from before PyTorch 1.6. The metadata is ``step``, of
    a trainer's checkpoint, and ``not loaded``, the classes of objects beside the tensors.
    """
    path = Path(path)
    check_file(path)
    with open(path, "rb") as handle:
        zipped = handle.read(4) == b"PK\x03\x04"
    records = _records(path) if zipped else {}
    held, replaced = _load(path, mmap=zipped)
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path}: holds no dictionary of tensors but a {type(held).__name__}")
    tensors = dict(_tensors(held, {}))
    step = held.get("global_step")
    texts = {"step": str(step)} if type(step) is int else {}
    texts |= {"not loaded": listed(replaced)} if replaced else {}
    inner = held.get("state_dict")
    state = inner if isinstance(inner, dict) and inner else held
    wrong = [k for k, v in state.items() if not (isinstance(k, str) and id(v) in tensors)]
    if wrong:
        texts = {key: value for key, value in state.items() if isinstance(key, str)}
        if family := foreign_family(texts):
            raise UserError(f"{path}: this is {family}: {FAMILIES_KNOWN}")
        names = (ascii(key) if isinstance(key, str) else type(key).__name__ for key in wrong)
        raise UserError(f"{path}: not a flat dictionary of tensors: {listed(names)}")
    check_names(path, state)
    dtypes = {key: _dtype(path, key, tensor) for key, tensor in state.items()}
    data = np.memmap(path, np.uint8, "r")
    # A tensor may show its numbers many times over; two models may share some.
    claimed = sum(tensor.numel() * dtypes[key].itemsize for key, tensor in state.items())
    if claimed > 2 * data.size:
        raise UserError(f"{path}: claims {claimed} bytes of numbers in its {data.size}")
    places = _places(path, tensors, records) if zipped else {}
    try:
        arrays = {key: _array(held, dtypes[key], places, data) for key, held in state.items()}
    except (TypeError, ValueError, RuntimeError) as err:
        raise _damaged(path, err) from err
    return arrays, texts


def _load(path: Path, *, mmap: bool) -> tuple[object, list[str]]:
    """The loaded object, and the names of classes that were replaced by placeholders."""
    try:
        import torch
    except ImportError as err:
        raise UserError(
            f"{path}: reading {path.suffix} files needs PyTorch: pip install 'fact-jax[torch]'"
        ) from err

    def load() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles of other versions, which work
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    names: list[str] = []
    try:
        try:
            return load(), []
        except pickle.UnpicklingError:
            names = _unknown_classes(path) if mmap else []
            if not names:
                raise
        try:
            with torch.serialization.safe_globals(_placeholders(names, _Placeholder)):
                return load(), names
        except pickle.UnpicklingError:  # some of them are dictionaries
            with torch.serialization.safe_globals(_placeholders(names, _PlaceholderDict)):
                return load(), names
    except pickle.UnpicklingError as err:
        reason = re.search(r"(Unsupported \w+|Unsupported global: GLOBAL \S+|GLOBAL \S+)", str(err))
        named = listed(names) or (reason[0].removeprefix("Unsupported global: ") if reason else "")
        raise UserError(
            f"{path}: refused, since it holds more than tensors and could run code"
            f"{f' ({named})' if named else ''}; ask for it as safetensors"
        ) from err
    except UserError:
        raise
    except Exception as err:  # a damaged file fails anywhere in the loader, with anything
        raise _damaged(path, err) from err


class _Placeholder:
    """Placeholder for an object of a class that is not imported."""

    held: list[object]

    def __new__(cls, *args):
        self = super().__new__(cls)
        self.held = [args]
        return self

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.held.append(state)


class _PlaceholderDict:
    """Placeholder for subclasses of dict: the loader sets items of an OrderedDict alone."""

    def __new__(cls, *args):
        return OrderedDict(held=args)


def _placeholders(names: list[str], kind: type) -> list[tuple[type, str]]:
    # numpy's types, and partial functions, are given a state that no dictionary has.
    kinds = {
        name: _Placeholder if name.startswith(("numpy.", "functools.")) else kind for name in names
    }
    return [(type(name, (base,), {}), name) for name, base in kinds.items()]


def _unknown_classes(path: Path) -> list[str]:
    """The classes in a file that PyTorch does not load. UserError if one of them could run code."""
    try:
        names = sorted(_torch().serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # what it cannot read, the loader refuses and says why
        return []
    for name in names:
        module, _, inner = name.partition(".")
        plain = module in _DATA_MODULES or (module == "builtins" and inner in _DATA_TYPES)
        if module in {*sys.stdlib_module_names, *_OLD_MODULES} and not plain:
            raise UserError(
                f"{path}: refused, since it holds more than tensors and could run code ({name}); "
                "ask for it as safetensors"
            )
    return names


def _damaged(path: Path, err: Exception | str) -> UserError:
    reason = ascii(first_line(err) if isinstance(err, Exception) else err)[1:-1]
    return UserError(f"{path}: not a whole PyTorch file ({reason[:300]})")


def _records(path: Path) -> dict[int, int]:
    """Offset and size of each data record. UserError for a compressed archive."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(f"{path}: is a TorchScript program, not weights")
        if sum(entry.file_size for entry in entries) > size:
            raise UserError(f"{path}: refused, it would unpack to more than its {size} bytes")
        records, places = {}, {}
        with open(path, "rb") as handle:
            for entry in entries:
                plain = entry.compress_type == zipfile.ZIP_STORED and not entry.flag_bits & 1
                if not plain or entry.compress_size != entry.file_size:
                    raise UserError(f"{path}: refused, it is packed as PyTorch never does")
                if entry.external_attr & _FOLDER:
                    raise UserError(f"{path}: refused, {entry.filename!a} is marked as a folder")
                handle.seek(entry.header_offset)
                mark, name, extra = _LOCAL.unpack(handle.read(_LOCAL.size))
                begin = entry.header_offset + _LOCAL.size + name + extra
                if mark != b"PK\x03\x04" or begin + entry.file_size > size:
                    raise _damaged(path, f"{entry.filename} is cut off")
                places[begin] = entry
                if entry.filename.endswith(".pkl") and entry.file_size > _PICKLE_LIMIT:
                    raise UserError(f"{path}: a pickle of {entry.file_size} bytes is too much")
                if entry.filename.endswith("/byteorder"):
                    handle.seek(begin)
                    if (order := handle.read(min(entry.file_size, 8))) != b"little":
                        raise UserError(f"{path}: its byte order is {order!r}, not 'little'")
                if "/data/" in entry.filename and entry.file_size:
                    records[begin] = entry.file_size
        _check_sums(path, places)
    except UserError:
        raise
    except Exception as err:  # a damaged archive fails anywhere, with anything
        raise _damaged(path, err) from err
    return records


def _check_sums(path: Path, places: Mapping[int, zipfile.ZipInfo]) -> None:
    """UserError if a record, by where it begins, is not what its checksum says."""
    data = np.memmap(path, np.uint8, "r")

    def differs(begin: int) -> bool:
        end, found = begin + places[begin].file_size, 0
        for start in range(begin, end, _BLOCK):
            block = data[start : min(start + _BLOCK, end)]
            found = zlib.crc32(block.data, found)
            release(block)
        return found != places[begin].CRC

    # PyTorch writes zeros if it is told not to work out any sums.
    summed = [begin for begin, entry in places.items() if entry.CRC]
    for begin, wrong in zip(summed, thread_map(differs, summed), strict=True):
        if wrong:
            raise _damaged(path, f"{places[begin].filename} is not what was written")


def _tensors(held: object, seen: dict[int, object]) -> Iterator[tuple[int, object]]:
    """Every tensor in nested dictionaries and lists, once, by its identity."""
    import torch

    rest = [held]
    while rest:
        value = rest.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if torch.is_tensor(value):
            yield id(value), value
        elif isinstance(value, dict):
            rest += [*value.values(), *getattr(value, "__dict__", {}).values()]
        elif isinstance(value, list | tuple | set):
            rest += value
        elif isinstance(value, _Placeholder):
            rest += value.held


def _places(path: Path, tensors: dict, records: dict[int, int]) -> dict[int, int]:
    """File offset of each storage by its address. UserError unless all fit the records.

    The loader maps the file, and takes where a storage begins from the archive but how long it is
    from the pickle.
    """
    storages = {}
    for tensor in tensors.values():
        if tensor.layout == _torch().strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
    found, known = sorted(storages.items()), sorted(records.items())
    shift = found[0][0] - known[0][0] if found and known else 0
    if [(address - shift, size) for address, size in found] != known:
        raise _damaged(path, "its pickle and its records do not agree")
    return {address: address - shift for address in storages}


def _dtype(path: Path, key: str, tensor) -> np.dtype:
    """The numpy dtype of a tensor. UserError unless it is strided and on the CPU."""
    dtype = _dtypes().get(tensor.dtype)
    if dtype is None or tensor.layout != _torch().strided or tensor.device.type != "cpu":
        raise UserError(f"{path}: {key} is {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    if tensor.is_neg() or tensor.is_conj():
        raise UserError(f"{path}: {key} is stored with its sign turned")
    return dtype


def _array(tensor, dtype: np.dtype, places: dict[int, int], data: np.ndarray) -> np.ndarray:
    if not tensor.numel():
        return np.zeros(tensor.shape, dtype)
    address = tensor.untyped_storage().data_ptr()
    if address in places:
        begin = places[address] + tensor.storage_offset() * dtype.itemsize
        strides = [step * dtype.itemsize for step in tensor.stride()]
        return np.ndarray(tensor.shape, dtype, data, begin, strides)
    tensor = tensor.detach()
    if dtype.isbuiltin == 1:
        return tensor.numpy()
    plain = {1: _torch().uint8, 2: _torch().int16}[dtype.itemsize]  # numpy has no such numbers
    return tensor.contiguous().view(plain).numpy().view(dtype)


def _torch():
    import torch

    return torch


def _dtypes() -> dict:
    torch = _torch()
    names = {dtype.name: dtype for dtype in DTYPES.values()}
    return {getattr(torch, name): dtype for name, dtype in names.items() if hasattr(torch, name)}


STORAGES = {
    **{np.dtype("f8"): "DoubleStorage", np.dtype("f4"): "FloatStorage"},
    **{np.dtype("f2"): "HalfStorage", np.dtype(ml_dtypes.bfloat16): "BFloat16Storage"},
    **{np.dtype("i8"): "LongStorage", np.dtype("i4"): "IntStorage", np.dtype("i2"): "ShortStorage"},
    **{np.dtype("i1"): "CharStorage", np.dtype("u1"): "ByteStorage", np.dtype(bool): "BoolStorage"},
}
"""What PyTorch's pickles call the numbers of each sort."""


def write_torch_file(
    path: str | os.PathLike,
    state: State,
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
        open(temporary, "wb") as handle,
        zipfile.ZipFile(handle, "w") as archive,
    ):
        archive.writestr(zipfile.ZipInfo(f"{folder}/data.pkl"), _pickled(path, state))
        archive.writestr(zipfile.ZipInfo(f"{folder}/byteorder"), "little")
        for number, stored in enumerate(state.values()):
            array = in_c_order(stored)
            entry = zipfile.ZipInfo(f"{folder}/data/{number}")
            # A field without a meaning, so long that the numbers begin at a multiple of 64.
            begin = handle.tell() + 30 + len(entry.filename.encode()) + 4
            entry.extra = struct.pack("<2sH", b"FB", -begin % 64) + b"Z" * (-begin % 64)
            with archive.open(entry, "w") as member:
                member.write(array.reshape(-1).view(np.uint8).data)
            release(array)
        archive.writestr(zipfile.ZipInfo(f"{folder}/version"), "3\n")


def _pickled(path: str | os.PathLike, state: State) -> bytes:
    """The archive's ``data.pkl``: for each tensor a call that builds it from its storage."""

    def plain(value: str | int | tuple[int, ...]) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    def named(module: str, name: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()

    parts = [pickle.PROTO + b"\x02" + pickle.EMPTY_DICT]
    for number, (key, array) in enumerate(state.items()):
        if array.dtype not in STORAGES:
            raise UserError(f"{path}: {key} is {array.dtype}, which the format does not have")
        strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        parts += [plain(key), named("torch._utils", "_rebuild_tensor_v2"), pickle.MARK]
        parts += [pickle.MARK, plain("storage"), named("torch", STORAGES[array.dtype])]
        parts += [plain(str(number)), plain("cpu"), plain(array.size), pickle.TUPLE]
        parts += [pickle.BINPERSID, plain(0), plain(array.shape), plain(tuple(strides))]
        parts += [pickle.NEWFALSE, named("collections", "OrderedDict"), pickle.EMPTY_TUPLE]
        parts += [pickle.REDUCE, pickle.TUPLE, pickle.REDUCE, pickle.SETITEM]
    return b"".join([*parts, pickle.STOP])
