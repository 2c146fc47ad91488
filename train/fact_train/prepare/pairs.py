"""Near pairs among many vectors of 8 bits: all with all, in blocks, exactly.

``hash``: signs of pictures' frequencies, also mirrored, of like colours. ``face``: embeddings.
One product of matrices answers both questions: whether hashes of -1 and 1 differ in few bits, and
whether embeddings point the same way. Whole numbers below 2^24 are exact in float32, so the answer
depends neither on the machine nor on the order.
"""

import dataclasses
import io
import itertools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int, Int8, UInt8

from fact_train.prepare.photos.measures import COLOUR_SIDE, mirrored
from fact_train.prepare.store import Store

BLOCK = 16384
"""Vectors on each side of a piece of work: ten million photos are 190,000 pieces of seconds."""
_TILE = (256, 512)
"""So many of these are in memory as products."""
_COLOURS_APART = 9
"""Of 255, in the worst channel."""


def block_names(kind: str, count: int) -> list[str]:
    """Names of the blocks of pairs among ``count`` vectors."""
    blocks = range(-(-count // BLOCK))
    pairs = itertools.combinations_with_replacement(blocks, 2)
    return [f"{kind}-{one:05d}-{other:05d}" for one, other in pairs]


def compare_blocks(work: str, plan: str, thresholds: dict[str, float], name: str) -> dict[str, int]:
    """The pairs of a block: ``PLAN/pairs/NAME.npy`` of rows (i, j), i < j; their number."""
    store = Store(work)
    file = f"{plan}/pairs/{name}.npy"
    if not store.exists(file):
        kind, one, other = name.split("-")
        starts = int(one) * BLOCK, int(other) * BLOCK
        with store.reading(f"{plan}/{kind}.npy") as path:
            vectors = np.load(path, mmap_mode="r")
            parts = [np.asarray(vectors[start : start + BLOCK]) for start in starts]
        options = {"hashes": kind == "hash", "upper": one == other}
        found = near_pairs(parts[0], parts[1], thresholds[kind], **options) + starts
        if kind == "hash":
            with store.reading(f"{plan}/colours.npy") as path:
                found = found[same_colours(np.load(path, mmap_mode="r"), found)]
        buffer = io.BytesIO()
        np.save(buffer, found[found[:, 0] < found[:, 1]])
        store.write(file, buffer.getvalue())
    return {}


def near_pairs(
    ones: Int8[np.ndarray, "n d"],
    others: Int8[np.ndarray, "m d"],
    threshold: float,
    *,
    hashes: bool,
    upper: bool = False,
) -> Int[np.ndarray, "pairs 2"]:
    """Pairs whose cosine is at least ``threshold``; of hashes, of a picture or its mirror image.

    With ``upper`` those of i < j are enough.
    """
    views = [others, mirrored(others)] if hashes else [others]
    found = [np.empty((0, 2), np.int64)]
    for row, column in itertools.product(
        range(0, len(ones), _TILE[0]), range(0, len(others), _TILE[1])
    ):
        if upper and column + _TILE[1] <= row:
            continue
        rows, columns = slice(row, row + _TILE[0]), slice(column, column + _TILE[1])
        near = np.any([cosines(ones[rows], view[columns]) >= threshold for view in views], 0)
        found.append(np.argwhere(near) + (row, column))
    return np.concatenate(found)


def same_colours(
    colours: UInt8[np.ndarray, "n cells"], pairs: Int[np.ndarray, "p 2"]
) -> Bool[np.ndarray, " p"]:
    """Whether three quarters of two views' cells are of one colour, as they are or mirrored.

    Not all of them: what a cut changes is near the borders.
    """
    shape = (-1, COLOUR_SIDE, COLOUR_SIDE, 3)
    found = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), _TILE[1]):
        some = slice(start, start + _TILE[1])
        one, other = (colours[pairs[some, side]].reshape(shape).astype(np.int16) for side in (0, 1))
        for view in (other, other[:, :, ::-1]):
            apart = np.abs(one - view).max(-1).reshape(len(one), -1)
            found[some] |= np.percentile(apart, 75, axis=1) <= _COLOURS_APART
    return found


def cosines(
    ones: Int8[np.ndarray, "n d"], others: Int8[np.ndarray, "m d"]
) -> Float[np.ndarray, "n m"]:
    left, right = ones.astype(np.float32), others.astype(np.float32)
    lengths = np.linalg.norm(left, axis=1)[:, None] * np.linalg.norm(right, axis=1)
    return left @ right.T / np.maximum(lengths, 1e-6)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """All pairs of a kind, in the order of the blocks, read again by each loop over them."""

    store: Store
    plan: str
    kind: str

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for name in self.store.names(f"{self.plan}/pairs"):
            if name.startswith(f"{self.kind}-"):
                found = np.load(io.BytesIO(self.store.read(f"{self.plan}/pairs/{name}")))
                for start in range(0, len(found), BLOCK):  # as Python's numbers they are large
                    yield from map(tuple, found[start : start + BLOCK].tolist())


class Groups:
    """Sets of numbers that pairs join."""

    def __init__(self, count: int):
        self._parent = np.arange(count, dtype=np.intc)

    def find(self, one: int) -> int:
        while self._parent[one] != one:
            self._parent[one] = self._parent[self._parent[one]]
            one = int(self._parent[one])
        return one

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low

    def members(self) -> dict[int, list[int]]:
        """The sets of more than one, by their smallest number."""
        found: dict[int, list[int]] = {}
        for one in np.flatnonzero(self._parent != np.arange(len(self._parent))).tolist():
            first = self.find(one)
            found.setdefault(first, [first]).append(one)
        return dict(sorted(found.items()))
