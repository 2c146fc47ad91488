"""Results kept by the content of what they were computed from."""

import collections
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fact_jax.utils.files import atomic_write


class ContentCache:
    """The last ``size`` results, by the bytes of arrays and by whatever else they depend on.

    ``hits`` and ``misses`` count. It is for one thread at a time.
    """

    def __init__(self, size: int = 64):
        self._size = size
        self._kept: collections.OrderedDict[bytes, Any] = collections.OrderedDict()
        self.hits = self.misses = 0

    def get(self, compute: Callable[[], Any], *content: object) -> Any:
        """The result of ``compute`` for this content, computed or as it was kept."""
        key = hashlib.sha256()
        for part in content:
            if isinstance(part, np.ndarray):
                key.update(np.ascontiguousarray(part).tobytes())
                part = part.dtype.str, part.shape
            key.update(f"\0{part!r}\0".encode())
        name = key.digest()
        if name in self._kept:
            self.hits += 1
            self._kept.move_to_end(name)
            return self._kept[name]
        self.misses += 1
        self._kept[name] = compute()
        if len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return self._kept[name]


class ArrayCache:
    """Arrays by a digest of what they were computed from; a damaged file is computed again."""

    def __init__(self, folder: Path):
        self.folder = folder

    def get(self, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        path = self.folder / f"{key}.npz"
        try:
            with np.load(path, allow_pickle=False) as held:
                return dict(held)
        except Exception:  # absent, or whatever a damaged archive causes
            arrays = compute()
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getvalue())
        return arrays
