"""Grain data loading: shuffled over the whole dataset, read and decoded by threads.

Everything follows from the seed and the step: which rows a batch has, in which order, and who
stands beside whom. So the step is the whole position, on any number of processes. A damaged record
changes that nowhere but in its own places, where another record stands for it.
"""

import functools
import hashlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Int

from fact_jax.utils.errors import UserError
from fact_train.data.records import DamagedError, data_libraries

_THREADS = 16
_ENDLESS = 2**62
MAX_DAMAGED = 100
_PARTNERS_TRIED = 8
_LOG = logging.getLogger(__name__)


class Dataset(Protocol):
    """Samples by number. ``fingerprint`` tells one data set from another."""

    identities: Int[np.ndarray, " n"]
    shapes: Int[np.ndarray, "n 2"] | None
    """Height and width of each photo; None where all are alike."""
    fingerprint: str

    def load(self, number: int, partner: int) -> dict[str, np.ndarray]:
        """A sample, with the face of row ``partner`` beside its own, as the photo's shape wants it.

        DamagedError, with the number, for a record that cannot be read.
        """


class SameIdentityPairs:
    """Pairs of photos of one person; an only photo is paired with itself."""

    def __init__(self, identities: Int[np.ndarray, " n"]):
        # Rows person after person, where each person begins, and where each row stands there.
        self._by_person = np.argsort(identities, kind="stable").astype(np.int32)
        _, person, counts = np.unique(identities, return_inverse=True, return_counts=True)
        self._person, self._counts = person.astype(np.int32), counts.astype(np.int32)
        self._begins = (np.cumsum(counts) - counts).astype(np.int32)
        self._place = np.empty(len(identities), np.int32)
        self._place[self._by_person] = np.arange(len(identities), dtype=np.int32)

    def draw(self, row: int, rng: np.random.Generator) -> int:
        """Each of the person's other photos with the same probability."""
        person = self._person[row]
        count, begin = int(self._counts[person]), int(self._begins[person])
        if count == 1:
            return row
        hop = int(rng.integers(1, count))
        return int(self._by_person[begin + (int(self._place[row]) - begin + hop) % count])


class DamagedRecords:
    """Damaged records: each is reported once, and too many are a UserError.

    The bound is a tenth of the records, and ``MAX_DAMAGED``.
    """

    def __init__(self, count: int):
        self.numbers: set[int] = set()
        self._bound = min(MAX_DAMAGED, max(1, count // 10), count - 1)
        self._lock = threading.Lock()

    def add(self, error: DamagedError) -> None:
        with self._lock:
            new = error.number not in self.numbers
            self.numbers.add(error.number)
            many = len(self.numbers)
        # Every thread that meets one from here on ends, or it might look for others for ever.
        if many > self._bound:
            raise UserError(
                f"{error}; that makes {many} damaged records, more than the {self._bound} that "
                "training skips: copy the folder again, or write it again"
            )
        if new:
            _LOG.warning("warning: %s; it is skipped (%d so far)", error, many)


class Buckets:
    """Rows whose photos are of one shape, which alone make a batch.

    Each bucket's batches go through its rows again and again, and of all batches it has the share
    that it has of the rows: exactly, over the epochs. Which bucket is next is shuffled.
    """

    def __init__(
        self, shapes: Int[np.ndarray, "n 2"] | None, count: int, batch_size: int, seed: int
    ):
        self.rows: list[Sequence[int] | Int[np.ndarray, " m"]] = [range(count)]
        if shapes is not None:
            _, which = np.unique(shapes, axis=0, return_inverse=True)
            self.rows = [np.flatnonzero(which.ravel() == i) for i in range(which.max() + 1)]
        self._count, self._batch_size, self._seed = count, batch_size, seed
        self._sizes = tuple(map(len, self.rows))

    def choose(self, step: int) -> tuple[int, int]:
        """The bucket of the batch after ``step`` steps, and how many batches it had before."""
        if len(self.rows) == 1:
            return 0, step
        epoch = step * self._batch_size // self._count
        while sum(_batches_before(self._sizes, self._batch_size, epoch + 1)) <= step:
            epoch += 1
        place = step - sum(_batches_before(self._sizes, self._batch_size, epoch))
        which, nth = _turns(self._sizes, self._batch_size, self._seed, epoch)
        return int(which[place]), int(nth[place])


def _batches_before(sizes: tuple[int, ...], batch_size: int, epoch: int) -> list[int]:
    """Whole batches of each bucket before an epoch; what is left goes into the next one's first."""
    return [epoch * size // batch_size for size in sizes]


@functools.lru_cache(maxsize=4)
def _turns(
    sizes: tuple[int, ...], batch_size: int, seed: int, epoch: int
) -> tuple[Int[np.ndarray, " b"], Int[np.ndarray, " b"]]:
    """Bucket of each batch of an epoch, and its number among that bucket's batches."""
    first, end = (_batches_before(sizes, batch_size, one) for one in (epoch, epoch + 1))
    which = np.repeat(np.arange(len(sizes)), np.subtract(end, first))
    which = np.random.default_rng([seed, epoch, 2]).permutation(which)
    nth = np.empty_like(which)
    for bucket, numbers in enumerate(map(np.arange, first, end)):
        nth[which == bucket] = numbers
    return which, nth


class GrainSource:
    """A ``fact_train.engine.task.Source`` of stored rows; every epoch visits each row once.

    Photos of several shapes come in batches of one (:class:`Buckets`).

    Where a record is damaged another of its shape is taken, and another partner where the partner
    is: which ones follows from the seed and the place alone, and all other places keep theirs.
    """

    def __init__(self, rows: Dataset, batch_size: int, seed: int):
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed}: the shuffle takes a seed from 0 to {2**32 - 1}")
        self._grain = data_libraries().grain
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._count = len(rows.identities)
        self._partners = SameIdentityPairs(rows.identities)
        self._damaged = DamagedRecords(self._count)
        self._buckets = Buckets(rows.shapes, self._count, batch_size, seed)
        self._orders = [
            self._grain.MapDataset.range(len(some)).seed(seed).shuffle().repeat()
            for some in self._buckets.rows
        ]
        text = f"{rows.fingerprint} {self._count} {batch_size} {seed}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def choose(self, step: int, row: int) -> tuple[int, int]:
        """Number of the sample, and of its partner, in a row of the batch after ``step`` steps."""
        position = step * self._batch_size + row
        bucket, before = self._buckets.choose(step)
        place = self._orders[bucket][before * self._batch_size + row]
        number = int(self._buckets.rows[bucket][place])
        return number, self._partners.draw(number, np.random.default_rng([self._seed, position]))

    def load(self, step: int, row: int) -> dict[str, np.ndarray]:
        """The sample in a row of the batch after ``step`` steps."""
        number, partner = self.choose(step, row)
        again = np.random.default_rng([self._seed, step * self._batch_size + row, 1])
        alike = self._buckets.rows[self._buckets.choose(step)[0]]
        failed = 0
        while True:
            try:
                return self._rows.load(number, partner)
            except DamagedError as error:
                self._damaged.add(error)
                if self._damaged.numbers.issuperset(alike):
                    raise UserError(f"{error}; no photo of its shape is left") from error
                if error.number == number:
                    number = int(alike[int(again.integers(len(alike)))])
            failed += 1
            partner = self._partners.draw(number, again)
            if failed > _PARTNERS_TRIED:  # none of the others may be readable
                partner = number

    def batches(self, start: int, rows: Int[np.ndarray, " r"]) -> Iterator[dict[str, np.ndarray]]:
        """These rows of the batches after ``start``, ``start`` + 1, ... steps."""

        def load(position: int) -> dict[str, np.ndarray]:
            ahead, place = divmod(position, len(rows))
            return self.load(start + ahead, int(rows[place]))

        options = self._grain.ReadOptions(
            num_threads=_THREADS, prefetch_buffer_size=max(_THREADS, 2 * len(rows))
        )
        samples = self._grain.MapDataset.range(_ENDLESS).map(load).to_iter_dataset(options)
        iterator = iter(samples.batch(len(rows), drop_remainder=True))
        try:
            yield from iterator
        finally:
            iterator.close()
