"""What all finished chunks say of their records: a few dozen bytes a photo in memory.

What is compared, 450 bytes a photo and an embedding, goes into files as it is read.
"""

import base64
import contextlib
import dataclasses
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import BinaryIO

import numpy as np
from jaxtyping import Float, Int, Int8, UInt8

from fact_train.prepare.photos.measures import COLOUR_SIDE, HASH_SIDE
from fact_train.prepare.store import Store

_BITS = HASH_SIDE * HASH_SIDE - 1


class Texts(Sequence[str]):
    """Strings in a temporary file; where each ends stays in memory."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the strings are there
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        self._file.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._file.write(text.encode()))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        start, end = self._ends[index], self._ends[index + 1]
        self._file.seek(start)
        return self._file.read(end - start).decode()


class NpyWriter:
    """A .npy file of two dimensions, row by row: NumPy leaves room in its header for their number.

    ``width`` is a row's when there is none.
    """

    def __init__(self, file: BinaryIO, dtype: type, width: int):
        self._file, self._dtype = file, np.dtype(dtype)
        self.rows, self.width = 0, width
        self._header()

    def __enter__(self) -> "NpyWriter":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.seek(0)
        self._header()

    def _header(self) -> None:
        header = {
            "descr": self._dtype.str,
            "fortran_order": False,
            "shape": (self.rows, self.width),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def append(self, row: Int8[np.ndarray, " d"] | UInt8[np.ndarray, " d"]) -> None:
        if self.rows == 0 and len(row) != self.width:
            self.width = len(row)
        if len(row) != self.width:
            raise ValueError(f"a row of {len(row)} numbers, others have {self.width}")
        self._file.write(row.astype(self._dtype, copy=False).tobytes())
        self.rows += 1


def open_npy(store: Store, name: str) -> np.ndarray:
    """An array that stays in its file; a copy from elsewhere is kept until it is closed."""
    with store.reading(name) as path:
        return np.load(path, mmap_mode="r")


@dataclasses.dataclass
class Table:
    """Records in the order of the source; ``label`` is a person's number, -1 without one."""

    chunk: Int[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    size: Int[np.ndarray, " n"]
    """Bytes of the record."""
    rank: Float[np.ndarray, "n 2"]
    """Of two copies the better one is kept: by quality, then by pixels."""
    label: Int[np.ndarray, " n"]
    labels: list[str]
    names: Texts
    embedded: Int[np.ndarray, " m"]
    """Which records have an embedding, and these."""
    embeddings: Int8[np.ndarray, "m d"]
    misfits: dict[int, int]
    """Records whose embedding has another length than most, and these; it is not compared."""

    def __len__(self) -> int:
        return len(self.names)

    def labelled(self) -> Iterator[tuple[int, Int[np.ndarray, " k"]]]:
        """Each labelled person, by number, and which of the embeddings are theirs."""
        labels = self.label[self.embedded]
        order = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[order], prepend=-2))
        for group in np.split(order, starts[1:]) if len(starts) else ():
            if (person := int(labels[group[0]])) >= 0:
                yield person, group


def read_table(store: Store, plan: str, chunks: Sequence[str]) -> Table:
    """Read the lines of all chunks; ``PLAN/hash.npy``, ``colours.npy`` and ``embeddings.npy``."""
    columns = {name: array("i") for name in ("chunk", "row", "size", "label", "embedded")}
    rank, labels, names = array("d"), dict[str, int](), Texts()
    misfits: dict[int, int] = {}
    lengths = Counter(
        len(line["embedding"]) for _, line in _accepted(store, chunks) if "embedding" in line
    )
    usual = max(lengths, key=lengths.__getitem__, default=0)
    with contextlib.ExitStack() as files:

        def writer(kind: str, dtype: type, width: int) -> NpyWriter:
            path = files.enter_context(store.writing(f"{plan}/{kind}.npy"))
            opened = files.enter_context(open(path, "wb"))
            return files.enter_context(NpyWriter(opened, dtype, width))

        hashes = writer("hash", np.int8, _BITS)
        colours = writer("colours", np.uint8, 3 * COLOUR_SIDE**2)
        embeddings = writer("embeddings", np.int8, 1)
        for number, line in _accepted(store, chunks):
            bits = np.unpackbits(_numbers(line["hash"], np.uint8), count=_BITS)
            signs = 2 * bits.view(np.int8) - 1
            if "embedding" in line:
                vector = _numbers(line["embedding"], np.int8)
                if len(line["embedding"]) == usual:
                    embeddings.append(vector)
                    columns["embedded"].append(len(names))
                else:
                    misfits[len(names)] = len(vector)
                    signs *= 0  # like no other
            names.append(line["name"])
            hashes.append(signs)
            colours.append(_numbers(line["colours"], np.uint8))
            who = line["identity"]
            columns["label"].append(labels.setdefault(who, len(labels)) if who else -1)
            columns["chunk"].append(number)
            columns["row"].append(line["row"])
            columns["size"].append(line["bytes"])
            rank.extend((line.get("quality", 0.0), line["width"] * line["height"]))
    return Table(
        **{name: np.frombuffer(values, np.intc) for name, values in columns.items()},
        rank=np.frombuffer(rank, np.float64).reshape(-1, 2),
        labels=list(labels),
        names=names,
        embeddings=open_npy(store, f"{plan}/embeddings.npy"),
        misfits=misfits,
    )


def _numbers(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b85decode(text), dtype)


def _accepted(store: Store, chunks: Sequence[str]) -> Iterator[tuple[int, dict]]:
    for number, chunk in enumerate(chunks):
        for line in store.lines(f"done/{chunk}.jsonl"):
            if "reason" not in line:
                yield number, line
