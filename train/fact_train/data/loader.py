"""Grain data loading: shuffled over the whole dataset, read and decoded by threads.

Everything follows from the seed and the step: which rows a batch has, in which order, and who
stands beside whom. So the step is the whole position, on any number of processes. A damaged record
changes that nowhere but in its own places, where another record stands for it.
"""

import hashlib
import logging
import threading
from collections.abc import Iterator
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
    fingerprint: str

    def load(self, number: int, partner: int) -> dict[str, np.ndarray]:
        """A sample, with the face of row ``partner`` beside its own; shapes are always the same.

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


class GrainSource:
    """A ``fact_train.engine.task.Source`` of stored rows; every epoch visits each row once.

    Where a record is damaged another is taken, and another partner where the partner is: which
    ones follows from the seed and the place alone, and all other places keep theirs.
    """

    def __init__(self, rows: Dataset, batch_size: int, seed: int):
        if not 0 <= seed < 2**32:
            raise UserError(f"seed={seed}: the shuffle takes a seed from 0 to {2**32 - 1}")
        self._grain = data_libraries().grain
        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._count = len(rows.identities)
        self._partners = SameIdentityPairs(rows.identities)
        self._damaged = DamagedRecords(self._count)
        self._order = self._grain.MapDataset.range(self._count).seed(seed).shuffle().repeat()
        text = f"{rows.fingerprint} {self._count} {batch_size} {seed}"
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def choose(self, step: int, row: int) -> tuple[int, int]:
        """Number of the sample, and of its partner, in a row of the batch after ``step`` steps."""
        position = step * self._batch_size + row
        number = int(self._order[position])
        return number, self._partners.draw(number, np.random.default_rng([self._seed, position]))

    def load(self, step: int, row: int) -> dict[str, np.ndarray]:
        """The sample in a row of the batch after ``step`` steps."""
        number, partner = self.choose(step, row)
        again = np.random.default_rng([self._seed, step * self._batch_size + row, 1])
        failed = 0
        while True:
            try:
                return self._rows.load(number, partner)
            except DamagedError as error:
                self._damaged.add(error)
                if error.number == number:
                    number = int(again.integers(self._count))
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
