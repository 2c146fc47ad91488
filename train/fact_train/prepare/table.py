"""What all finished chunks say of their records, in arrays: a few hundred bytes a photo."""

import base64
import dataclasses
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
    columns: dict[str, list] = {"chunk": [], "row": [], "size": [], "rank": [], "label": []}
    labels: dict[str, int] = {}
    names: list[str] = []
    embedded: list[int] = []
    hashes, colours, embeddings = [], [], []
    for number, line in _accepted(store, chunks):
        if "embedding" in line:
            embedded.append(len(names))
            embeddings.append(base64.b85decode(line["embedding"]))
            if len(embeddings[-1]) != len(embeddings[0]):
                raise UserError(
                    f"{line['name']}: its embedding has {len(embeddings[-1])} numbers, others have "
                    f"{len(embeddings[0])}"
                )
        names.append(line["name"])
        hashes.append(base64.b85decode(line["hash"]))
        colours.append(base64.b85decode(line["colours"]))
        who = line["identity"]
        columns["label"].append(labels.setdefault(who, len(labels)) if who else -1)
        columns["chunk"].append(number)
        columns["row"].append(line["row"])
        columns["size"].append(line["bytes"])
        columns["rank"].append((line.get("quality", 0.0), line["width"] * line["height"]))
    packed = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, 32)
    bits = np.unpackbits(packed, axis=1, count=_BITS)
    dimensions = len(embeddings[0]) if embeddings else 1
    return Table(
        **{
            name: np.asarray(values, np.int64) for name, values in columns.items() if name != "rank"
        },
        rank=np.asarray(columns["rank"], np.float64).reshape(-1, 2),
        labels=list(labels),
        names=names,
        hashes=2 * bits.astype(np.int8) - 1,
        colours=np.frombuffer(b"".join(colours), np.uint8).reshape(-1, 3 * COLOUR_SIDE**2),
        embedded=np.asarray(embedded, np.int64),
        embeddings=np.frombuffer(b"".join(embeddings), np.int8).reshape(-1, dimensions),
    )


def _accepted(store: Store, chunks: Sequence[str]) -> Iterator[tuple[int, dict]]:
    for number, chunk in enumerate(chunks):
        for line in store.lines(f"done/{chunk}.jsonl"):
            if "reason" not in line:
                yield number, line
