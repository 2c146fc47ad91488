"""The product: shards of records with a line about each, and the files that tell of the whole."""

import itertools
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
from jaxtyping import Int

from fact_jax.utils.command_line import version_of
from fact_train.data.dataset_files import (
    DESCRIPTION,
    face_features,
    shard_name,
    shard_reader,
    shard_writer,
    with_identity,
    write_info,
)
from fact_train.data.records import NAME, VERSION
from fact_train.prepare.product.card import card
from fact_train.prepare.store import Store, json_line

FOLDER = f"{NAME}/{VERSION}"
SUMMARY, REJECTED, SUSPECTS = "summary.json", "rejected.jsonl", "suspects.jsonl"
CARD, ABOUT, LOG, WORK = "README.md", "about", "log.jsonl", "work"
OURS = (NAME, ABOUT, WORK, SUMMARY, REJECTED, SUSPECTS, CARD, LOG, "report.html")
"""Everything that a build writes into its folder."""
_MOST_TOLD = 50
"""Kinds of a licence, source or consent that are counted each; others are counted together."""


def about_name(split: str, shard: int) -> str:
    """The lines about the records of a shard, in their order."""
    return f"{ABOUT}/{split}-{shard:05d}.jsonl"


def removed_digests(store: Store) -> set[str]:
    """SHA-256 of the names of those who were removed from a set."""
    lines = store.lines(LOG) if store.exists(LOG) else ()
    return {line["person_sha256"] for line in lines if "person_sha256" in line}


def numbered(name: str) -> tuple[str, int]:
    """Split and number of the shard ``SPLIT-I-OF-N``."""
    split, shard, _ = name.split("-")
    return split, int(shard)


def record_file(name: str) -> str:
    """Where the records of the shard ``SPLIT-I-OF-N`` are."""
    split, shard = numbered(name)
    return f"{FOLDER}/{shard_name(shard, int(name.split('-')[2]), split)}"


def plan_shards(sizes: Sequence[int], megabytes: float) -> list[int]:
    """Where shards end, but the last: before a record that would make one larger than that."""
    ends, filled = [], 0
    for number, size in enumerate(map(int, sizes)):  # the sum may be beyond 32 bits
        if filled and filled + size > megabytes * 2**20:
            ends.append(number)
            filled = 0
        filled += size
    return ends


class Numbering:
    """Equal numbers for equal names, in the order in which they come."""

    def __init__(self, names: Iterable[Hashable] = ()):
        self._seen: dict[Hashable, int] = {}
        self._numbers = array("i")
        for name in names:
            self.append(name)

    def append(self, name: Hashable) -> None:
        self._numbers.append(self._seen.setdefault(name, len(self._seen)))

    @property
    def numbers(self) -> Int[np.ndarray, " n"]:
        return np.array(self._numbers)


def write_shard(work: str, plan: str, out: str, name: str) -> dict[str, int]:
    """Shard ``SPLIT-I-OF-N`` by ``PLAN/shards/NAME.jsonl``, and the lines about its records."""
    store, product = Store(work), Store(out)
    marker = f"{plan}/written/{name}.json"
    if store.exists(marker):
        return {}
    records, about = store.lines(f"{plan}/shards/{name}.jsonl"), about_name(*numbered(name))
    with product.writing(record_file(name)) as temporary, product.writing(about) as told:
        writer = shard_writer(temporary)
        with open(told, "w", encoding="utf-8") as lines:
            for record, line in _planned(store, records):
                writer.write(record)
                lines.write(json_line(line))
        writer.close()
        size = temporary.stat().st_size
    store.write(marker, json.dumps({"bytes": size}))
    return {}


def _planned(store: Store, records: Iterable[dict]) -> Iterator[tuple[bytes, dict]]:
    """Records with their final identities, and lines; neighbours come from the same chunk."""
    for chunk, wanted in itertools.groupby(records, key=lambda record: record["chunk"]):
        rows = {line["row"]: line for line in store.lines(f"done/{chunk}.jsonl") if "row" in line}
        with store.reading(f"done/{chunk}.array_record") as path:
            reader = shard_reader(path)
            for about in wanted:
                row, identity = about["row"], about["identity"]
                line = {
                    key: value
                    for key, value in rows[row].items()
                    if key not in ("row", "bytes", "colours", "embedding")
                }
                record = reader.read([row])[0]
                if line["identity"] != identity:
                    record = with_identity(record, identity)
                yield record, line | {"identity": identity}
            reader.close()


def finish(
    out: Store,
    shards: Mapping[str, Sequence[tuple[int, int]]],
    people: Mapping[str, Int[np.ndarray, " n"]],
    sizes: tuple[int, int],
    about: dict[str, Any],
) -> None:
    """Write index, card and at last ``summary.json``: a folder with it is whole.

    ``shards`` gives (records, bytes) of each, ``people`` the person of each record by split,
    numbered in order, and nobody in two of them;
    ``about`` goes into the summary, beside what is counted here.
    """
    splits = {
        split: ([count for count, _ in some], sum(size for _, size in some))
        for split, some in shards.items()
    }
    counted, shapes = count_lines(out, shards, sizes[0])
    bytes_of = {
        shard_name(i, len(some), split): size
        for split, some in shards.items()
        for i, (_, size) in enumerate(some)
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = DESCRIPTION + f"\nBuilt by fact-train data: {CARD} two folders up tells of what.\n"
        features = face_features(None if shapes else sizes[0], sizes[1])
        write_info(folder, features, splits, people, bytes_of, shapes=shapes, description=text)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "features.json"):
            out.write(f"{FOLDER}/{path.name}", path.read_bytes())
    summary = about | {
        "software": f"fact-jax {version_of()}",
        "size": sizes[0],
        "crop": sizes[1],
        "records": sum(map(len, people.values())),
        "people": sum(int(who.max()) + 1 for who in people.values()),
        "splits": {
            split: {
                "records": len(who),
                "people": int(who.max()) + 1,
                "shards": len(shards[split]),
            }
            for split, who in people.items()
        },
        **counted,
    }
    write_summary(out, summary)


def write_summary(out: Store, summary: dict[str, Any]) -> None:
    """The summary of a set, and its card, which tells the same."""
    out.write(CARD, card(summary))
    out.write(SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def count_lines(
    out: Store, shards: Mapping[str, Sequence], size: int
) -> tuple[dict[str, Any], dict[str, Int[np.ndarray, "n 2"]]]:
    """What the lines about the records add up to, and the photos' shapes if not all are square."""
    counts: dict[str, Counter[str]] = {
        key: Counter() for key in ("licences", "sources", "consent", "made_by", "shapes")
    }
    shapes = {split: array("i") for split in shards}
    for split, some in shards.items():
        for shard in range(len(some)):
            for line in out.lines(about_name(split, shard)):
                source = line.get("source", "not told")
                _count(counts["sources"], _host(source))
                _count(counts["licences"], line.get("licence", "not told"))
                _count(counts["consent"], line.get("consent", "not told"))
                for role, name in line["by"].items():
                    counts["made_by"][f"{role}: {name}"] += 1
                shape = line.get("shape", (size, size))
                shapes[split].extend(shape)
                counts["shapes"]["{} x {}".format(*shape)] += 1
    told = {key: dict(found.most_common()) for key, found in counts.items()}
    if counts["shapes"].keys() == {f"{size} x {size}"}:
        return told, {}
    return told, {split: np.array(some).reshape(-1, 2) for split, some in shapes.items()}


def _host(source: str) -> str:
    """The host of an address; anything else is told as it is."""
    try:
        return urlparse(source).netloc or source
    except ValueError:
        return source


def _count(found: Counter[str], key: str) -> None:
    found[key if key in found or len(found) < _MOST_TOLD else "others"] += 1


def write_lines(out: Store, name: str, lines: Iterable[dict]) -> int:
    """A JSONL file of any length, whole or not at all; the number of its lines."""
    count = 0
    with out.writing(name) as temporary, open(temporary, "w", encoding="utf-8") as opened:
        for line in lines:
            opened.write(json_line(line))
            count += 1
    return count
