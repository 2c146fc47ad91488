"""What all finished chunks say of their records, in arrays: a few hundred bytes a photo."""

import base64
import dataclasses
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int, Int8, UInt8

from fact_jax.utils.errors import UserError
from fact_train.prepare.photos.measures import COLOUR_SIDE, HASH_SIDE
from fact_train.prepare.store import Store

_BITS = HASH_SIDE * HASH_SIDE - 1


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
    names: list[str]
    hashes: Int8[np.ndarray, "n bits"]
    colours: UInt8[np.ndarray, "n cells"]
    embedded: Int[np.ndarray, " m"]
    """Which records have an embedding, and these."""
    embeddings: Int8[np.ndarray, "m d"]

    def __len__(self) -> int:
        return len(self.names)


def read_table(store: Store, chunks: Sequence[str]) -> Table:
    """Read the lines of all chunks."""
    numbers = {name: array("q") for name in ("chunk", "row", "size", "label", "embedded")}
    rank, labels, names = array("d"), dict[str, int](), list[str]()
    hashes, colours, embeddings, dimensions = bytearray(), bytearray(), bytearray(), 1
    for number, line in _accepted(store, chunks):
        if "embedding" in line:
            vector = base64.b85decode(line["embedding"])
            if embeddings and len(vector) != dimensions:
                raise UserError(
                    f"{line['name']}: its embedding has {len(vector)} numbers, others have "
                    f"{dimensions}"
                )
            dimensions = len(vector)
            embeddings += vector
            numbers["embedded"].append(len(names))
        names.append(line["name"])
        hashes += base64.b85decode(line["hash"])
        colours += base64.b85decode(line["colours"])
        who = line["identity"]
        numbers["label"].append(labels.setdefault(who, len(labels)) if who else -1)
        numbers["chunk"].append(number)
        numbers["row"].append(line["row"])
        numbers["size"].append(line["bytes"])
        rank.extend((line.get("quality", 0.0), line["width"] * line["height"]))
    packed = np.frombuffer(bytes(hashes), np.uint8).reshape(-1, -(-_BITS // 8))
    signs = np.unpackbits(packed, axis=1, count=_BITS).view(np.int8)
    signs *= 2
    signs -= 1
    return Table(
        **{name: np.array(values, np.int64) for name, values in numbers.items()},
        rank=np.array(rank, np.float64).reshape(-1, 2),
        labels=list(labels),
        names=names,
        hashes=signs,
        colours=np.frombuffer(bytes(colours), np.uint8).reshape(-1, 3 * COLOUR_SIDE**2),
        embeddings=np.frombuffer(bytes(embeddings), np.int8).reshape(-1, dimensions),
    )


def _accepted(store: Store, chunks: Sequence[str]) -> Iterator[tuple[int, dict]]:
    for number, chunk in enumerate(chunks):
        for line in store.lines(f"done/{chunk}.jsonl"):
            if "reason" not in line:
                yield number, line
