"""Lazy tensors: read, cast and transposed only when they are used, so never all in memory."""

import mmap
import os
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fact_jax.utils.errors import UserError


class LazyTensor:
    """An array that is read, or computed, every time it is used.

    Transpositions, views and ``astype`` give a ``LazyTensor`` again; ``np.asarray`` and everything
    else that arrays can do reads it.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[], np.ndarray],
    ):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read
        self.ndim = len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=object))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> "LazyTensor":  # noqa: N802  (numpy's name)
        return self._viewed(lambda array: array.T)

    def transpose(self, *axes) -> "LazyTensor":
        return self._viewed(lambda array: array.transpose(*axes))

    def reshape(self, *shape) -> "LazyTensor":
        return self._viewed(lambda array: array.reshape(*shape))

    def __getitem__(self, index) -> "LazyTensor":
        return self._viewed(lambda array: array[index])

    def astype(self, dtype) -> "LazyTensor":
        return LazyTensor(self.shape, dtype, lambda: np.asarray(self).astype(dtype))

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._read()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape}, not {self.dtype} {self.shape}")
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getattr__(self, name: str) -> Any:
        # Protocols that hand out a pointer would outlive the array that they point into.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def _viewed(self, view: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        shape = view(np.broadcast_to(np.int8(0), self.shape)).shape
        return LazyTensor(shape, self.dtype, lambda: view(np.asarray(self)))


Tensor = np.ndarray | LazyTensor
State = Mapping[str, Tensor]
"""A flat state dict: tensors by their PyTorch names."""


def cast(array: Tensor, dtype: np.dtype, name: str) -> Tensor:
    """``array`` lazily cast to a dtype, with :func:`check_range`."""
    if array.dtype == dtype:
        return array

    def read() -> np.ndarray:
        wide = np.asarray(array)
        with np.errstate(over="ignore"):
            return check_range(wide.astype(dtype), wide, name)

    return LazyTensor(array.shape, dtype, read)


def check_range(narrow: np.ndarray, wide: Tensor, name: str) -> np.ndarray:
    """``narrow``, if no number became infinite when ``wide`` was rounded to it; else UserError."""
    if narrow.dtype != wide.dtype and np.isinf(narrow).any():
        wide = np.asarray(wide)
        lost = np.abs(wide[np.isinf(narrow) & np.isfinite(wide)].astype(np.float64))
        if lost.size:
            limits = {name: float(ml_dtypes.finfo(name).max) for name in ("bfloat16", "float32")}
            hint = next((x for x, most in limits.items() if lost.max() <= most), "float64")
            raise UserError(
                f"{name}: {lost.size} numbers, up to {lost.max():.4g}, are too large for "
                f"{narrow.dtype.name}; {hint} holds them"
            )
    return narrow


def contiguous(view: Tensor, dtype: np.dtype | None = None) -> np.ndarray:
    """A copy in C order, by slices that fit the cache: half the time of one at once."""
    view = np.asarray(view)
    out = np.empty(view.shape, dtype or view.dtype)
    if view.ndim < 2 or view.flags.c_contiguous:
        out[...] = view
        return out
    axis = 2 if view.ndim == 4 and view.shape[2] > view.shape[1] else 1  # the inputs of a layer
    for start in range(0, view.shape[axis], 16):
        part = (slice(None),) * axis + (slice(start, start + 16),)
        out[part] = view[part]
    return out


_WRITE_SIZE = 1 << 18
"""Bytes of one write, as in ``cp``: for more, Linux looks for huge pages, which may take long."""
_RWF_DONTCACHE = 0x80
"""Linux 6.14 and later: what is written goes to disk at once and leaves the page cache, which takes
half the time of 3.4 GB through it."""


def release(array: Tensor) -> None:
    """Free the memory of an array of a mapped file: what is wanted again is read again."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(array, np.ndarray) and isinstance(base, mmap.mmap) and array.nbytes:
        low, high = np.lib.array_utils.byte_bounds(array)
        origin = np.frombuffer(base, np.uint8).ctypes.data
        begin = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
        base.madvise(mmap.MADV_DONTNEED, begin, high - origin - begin)


def in_c_order(array: Tensor) -> np.ndarray:
    """The numbers of a stored array in C order: the array itself, or a copy."""
    stored = np.asarray(array)
    if stored.flags.c_contiguous:
        return stored
    copied = contiguous(stored)
    release(stored)
    return copied


def pwrite_array(handle, array: np.ndarray, offset: int, *, uncached: bool = False) -> None:
    """Write an array in C order at an offset of an open file, from any thread.

    What is written ``uncached`` has to come from the disk when it is read again.
    """
    rest = array.reshape(-1).view(np.uint8).data
    flags = _RWF_DONTCACHE if uncached else 0
    while rest:
        try:
            count = os.pwritev(handle.fileno(), [rest[:_WRITE_SIZE]], offset, flags)
        except (OSError, NotImplementedError):
            if not flags:
                raise
            flags = 0  # an older Linux, another system or file system
            continue
        rest, offset = rest[count:], offset + count
    release(array)
