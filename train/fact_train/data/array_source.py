"""Training data in memory: shuffled batches of arrays."""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class ShuffledArrays:
    """A ``Source`` of arrays, shuffled by the seed and the epoch alone.

    Every epoch visits each row once; the batch of any step costs the same.
    """

    arrays: dict[str, np.ndarray]
    batch_size: int
    seed: int

    def rows(self, step: int) -> Int[np.ndarray, " b"]:
        """Row numbers of the batch after ``step`` steps."""
        count = len(next(iter(self.arrays.values())))
        first = step * self.batch_size
        wanted = np.arange(first, first + self.batch_size)
        orders = {epoch: _permutation(self.seed, int(epoch), count) for epoch in wanted // count}
        return np.asarray([orders[i // count][i % count] for i in wanted])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Checksum of the arrays, the batch size and the seed."""
        found = zlib.crc32(f"{self.batch_size} {self.seed}".encode())
        for name, array in self.arrays.items():
            found = zlib.crc32(f"{name} {array.shape} {array.dtype}".encode(), found)
            found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return f"{found:08x}"

    def batches(self, start: int, rows: Int[np.ndarray, " r"]) -> Iterator[dict[str, np.ndarray]]:
        """These rows of the batches after ``start``, ``start`` + 1, ... steps."""
        for step in itertools.count(start):
            yield self.batch(step, rows)

    def batch(self, step: int, rows: Int[np.ndarray, " r"]) -> dict[str, np.ndarray]:
        """These rows of the batch after ``step`` steps."""
        chosen = self.rows(step)[rows]
        return {name: array[chosen] for name, array in self.arrays.items()}


@dataclasses.dataclass(frozen=True)
class PairedArrays(ShuffledArrays):
    """``ShuffledArrays`` with ``partner``: the face tokens of another photo of the same person.

    Rows are sorted by person, ``photos`` of each. An only photo is its own partner.
    """

    photos: int

    def batch(self, step: int, rows: Int[np.ndarray, " r"]) -> dict[str, np.ndarray]:
        """These rows of the batch after ``step`` steps."""
        own = self.rows(step)
        rng = np.random.default_rng([self.seed, step, 1])
        hop = rng.integers(min(1, self.photos - 1), self.photos, len(own))
        partner = own - own % self.photos + (own % self.photos + hop) % self.photos
        return {**super().batch(step, rows), "partner": self.arrays["tokens"][partner[rows]]}


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, count: int) -> Int[np.ndarray, " n"]:
    return np.random.default_rng([seed, epoch]).permutation(count)
