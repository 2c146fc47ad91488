"""Arrays that are not in memory: read when wanted, turned to another layout tensor by tensor."""

import mmap
import os
import threading
from collections.abc import Callable

import ml_dtypes
import numpy as np

from fact_jax.utils.errors import UserError


class LazyTensor:
    """Stands for an array that is read, or computed, every time it is wanted.

    Transpositions, views and ``astype`` give a ``LazyTensor`` again; ``np.asarray`` and everything
    else that arrays can do reads it. ``source`` is the array that it is made of, if it is one.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        read: Callable[[], np.ndarray],
        source: "np.ndarray | LazyTensor | None" = None,
    ):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read
        self.ndim, self.source = len(self.shape), source

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
        return LazyTensor(self.shape, dtype, lambda: np.asarray(self).astype(dtype), self)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self._read()
        if array.shape != self.shape or array.dtype != self.dtype:
            raise ValueError(f"{array.dtype} {array.shape}, not {self.dtype} {self.shape}")
        return array if dtype is None else array.astype(dtype, copy=False)

    def __getattr__(self, name: str):
        # Protocols that hand out a pointer would outlive the array that they point into.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(np.asarray(self), name)

    def _viewed(self, view: Callable[[np.ndarray], np.ndarray]) -> "LazyTensor":
        shape = view(np.broadcast_to(np.int8(0), self.shape)).shape
        return LazyTensor(shape, self.dtype, lambda: view(np.asarray(self)), self)


def cast(array: np.ndarray | LazyTensor, dtype: np.dtype, name: str) -> np.ndarray | LazyTensor:
    """``array`` in another precision, computed when wanted; then :func:`check_range` applies."""
    if array.dtype == dtype:
        return array

    def read() -> np.ndarray:
        wide = np.asarray(array)
        with np.errstate(over="ignore"):
            return check_range(wide.astype(dtype), wide, name)

    return LazyTensor(array.shape, dtype, read, array)


def check_range(narrow: np.ndarray, wide: np.ndarray | LazyTensor, name: str) -> np.ndarray:
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


def contiguous(
    view: np.ndarray | LazyTensor, dtype: np.dtype | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """A copy in C order, in ``out`` if it is given.

    By slices that fit the cache: half the time of one at once.
    """
    view = np.asarray(view)
    out = np.empty(view.shape, dtype or view.dtype) if out is None else out
    if view.ndim < 2 or view.flags.c_contiguous:
        out[...] = view
        return out
    axis = 2 if view.ndim == 4 and view.shape[2] > view.shape[1] else 1  # the inputs of a layer
    for start in range(0, view.shape[axis], 16):
        part = (slice(None),) * axis + (slice(start, start + 16),)
        out[part] = view[part]
    return out


def prefetch(array: np.ndarray | LazyTensor) -> None:
    """Have the disk read an array of a mapped file at once, not page by page as it is used."""
    while isinstance(array, LazyTensor):
        array = array.source
    _advise(array, mmap.MADV_WILLNEED)


def release(array: np.ndarray) -> None:
    """Let go of the memory of an array of a mapped file: what is wanted again is read again."""
    _advise(array, mmap.MADV_DONTNEED)


def _advise(array: np.ndarray | None, advice: int) -> None:
    base = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and array.nbytes:
        low, high = np.lib.array_utils.byte_bounds(array)
        origin = np.frombuffer(base, np.uint8).ctypes.data
        begin = (low - origin) // mmap.PAGESIZE * mmap.PAGESIZE
        base.madvise(advice, begin, high - origin - begin)


State = dict[str, np.ndarray | LazyTensor]


_THREAD = threading.local()


_PIECE = 1 << 18
"""At once, as ``cp`` does. For more, Linux looks for larger pages, and may look for long."""


def contiguous_buffer(array: np.ndarray | LazyTensor) -> np.ndarray:
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


def pwrite_array(handle, array: np.ndarray, offset: int, flags: int = 0) -> None:
    """Write an array in C order at a place in an open file, from any thread."""
    rest = memoryview(array.reshape(-1).view(np.uint8))
    while rest:
        count = os.pwritev(handle.fileno(), [rest[:_PIECE]], offset, flags)
        rest, offset = rest[count:], offset + count
    release(array)
