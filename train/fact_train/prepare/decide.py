"""What takes all photos to know: copies, who is who, splits, and what looks wrong."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int8
from scipy.cluster.hierarchy import fcluster, linkage

from fact_train.prepare.pairs import Groups, cosines
from fact_train.prepare.settings import BuildSettings
from fact_train.prepare.table import Table

_LARGEST = 4000
"""Photos of a group that is looked at as a whole; a larger one stays as its pairs join it."""


@dataclasses.dataclass
class Decisions:
    """``rejected``: record -> reason and line. ``identity``: a name for each record."""

    rejected: dict[int, tuple[str, str]]
    identity: list[str]
    suspects: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Units:
    """What is compared by face: a labelled person's mean, or a photo without a label."""

    vectors: Int8[np.ndarray, "u d"]
    person: Int[np.ndarray, " u"]
    """The labelled person, or -1."""
    record: Int[np.ndarray, " u"]
    """The photo, or -1."""


def units_of(table: Table) -> Units:
    """People and unlabelled photos that have an embedding."""
    labels = table.label[table.embedded]
    people = np.unique(labels[labels >= 0])
    means = [_mean(table.embeddings[labels == person]) for person in people]
    alone = labels < 0
    vectors = [*means, *table.embeddings[alone]]
    dimensions = table.embeddings.shape[1]
    return Units(
        np.asarray(vectors, np.int8).reshape(-1, dimensions),
        np.concatenate([people, np.full(alone.sum(), -1)]),
        np.concatenate([np.full(len(people), -1), table.embedded[alone]]),
    )


def _unit(vectors: Int8[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    found = vectors.astype(np.float64)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def _mean(vectors: Int8[np.ndarray, "n d"]) -> Int8[np.ndarray, " d"]:
    mean = _unit(vectors).sum(0)
    return np.rint(mean * (127.0 / max(np.abs(mean).max(), 1e-9))).astype(np.int8)


def decide(
    table: Table,
    units: Units,
    same_picture: Iterable[tuple[int, int]],
    same_face: Iterable[tuple[int, int]],
    settings: BuildSettings,
) -> Decisions:
    """Copies are rejected but for the best; who has no label is named by face; the rest is told."""
    copies = Groups(len(table))
    links: list[tuple[str, int, int]] = []
    for one, other in same_picture:
        ones, others = table.label[one], table.label[other]
        if ones >= 0 and others >= 0 and ones != others:
            links.append(("same picture", one, other))
        else:
            copies.join(one, other)
    rejected: dict[int, tuple[str, str]] = {}
    kept: dict[int, int] = {}
    for group in copies.members().values():
        # A labelled copy before one without, then the better one, then the first.
        best = max(group, key=lambda i: (table.label[i] >= 0, *table.rank[i], -i))
        for one in group:
            if one != best:
                line = f"{table.names[one]} is the same picture as {table.names[best]}"
                rejected[one], kept[one] = ("duplicate", line), best
    identity = [table.labels[label] if label >= 0 else "" for label in table.label]
    links += _name_by_face(table, units, same_face, identity, settings)
    for one, name in enumerate(identity):
        identity[one] = name or f"only {table.names[one]}"
    for one, best in kept.items():
        identity[one] = identity[best]
    suspects = [
        {
            "kind": kind,
            "photos": [table.names[one], table.names[other]],
            "people": [identity[one], identity[other]],
        }
        for kind, one, other in links
        if identity[one] != identity[other]
    ]
    suspects += _disagreeing(table, rejected, settings)
    photos: dict[str, list[int]] = defaultdict(list)
    for one, name in enumerate(identity):
        if one not in rejected:
            photos[name].append(one)
    for name, group in photos.items():
        if len(group) < settings.min_photos:
            for one in group:
                line = f"{table.names[one]}: {name} has {len(group)} usable photos"
                rejected[one] = ("few photos", f"{line}, {settings.min_photos} are needed")
    _mark_splits(suspects, settings)
    return Decisions(rejected, identity, suspects)


def _name_by_face(
    table: Table,
    units: Units,
    pairs: Iterable[tuple[int, int]],
    identity: list[str],
    settings: BuildSettings,
) -> list[tuple[str, int, int]]:
    """Name the photos without a label, in place; gives pairs that look alike beyond that."""
    groups, alike = Groups(len(units.person)), []
    first: dict[int, int] = {}
    for record, label in enumerate(table.label):
        first.setdefault(int(label), record)
    for one, other in pairs:
        if units.person[one] < 0 and units.person[other] < 0:
            groups.join(one, other)
        alike.append((one, other))
    loose = [one for one in range(len(units.person)) if units.person[one] < 0]
    named: dict[int, list[int]] = defaultdict(list)
    for one in loose:
        named[groups.find(one)].append(one)
    count = 0
    for group in named.values():
        for part in _tight(group, units.vectors, settings.same_face):
            count += 1
            for one in part:
                identity[units.record[one]] = f"person-{count:07d}"

    def record_of(one: int) -> int:
        record = int(units.record[one])
        return record if record >= 0 else first[int(units.person[one])]

    return [("same face", record_of(one), record_of(other)) for one, other in alike]


def _tight(
    group: Sequence[int], vectors: Int8[np.ndarray, "u d"], cosine: float
) -> list[list[int]]:
    """Parts of a chained group whose mean cosine holds (average linkage), sorted."""
    if len(group) < 3 or len(group) > _LARGEST:
        return [list(group)]
    some = vectors[list(group)]
    distances = 1 - np.round(cosines(some, some).astype(np.float64), 6)
    condensed = np.maximum(distances[np.triu_indices(len(group), 1)], 0)
    parts: dict[int, list[int]] = defaultdict(list)
    for one, part in zip(
        group, fcluster(linkage(condensed, "average"), 1 - cosine, "distance"), strict=True
    ):
        parts[int(part)].append(one)
    return sorted(parts.values())


def _disagreeing(
    table: Table, rejected: dict[int, tuple[str, str]], settings: BuildSettings
) -> list[dict[str, Any]]:
    """Labelled photos whose face is unlike the mean of the person's others."""
    found = []
    labels = table.label[table.embedded]
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-2))
    for group in np.split(order, starts[1:] if len(starts) else []):
        used = [i for i in group if int(table.embedded[i]) not in rejected]
        if len(used) < 2 or labels[used[0]] < 0:
            continue
        faces = _unit(table.embeddings[used])
        others = faces.sum(0) - faces
        cosine = (faces * others).sum(1) / np.maximum(np.linalg.norm(others, axis=1), 1e-9)
        for i in np.flatnonzero(cosine < settings.other_face):
            record = int(table.embedded[used[i]])
            found.append(
                {
                    "kind": "disagrees",
                    "photos": [table.names[record]],
                    "people": [table.labels[labels[used[0]]]],
                    "cosine": round(float(cosine[i]), 4),
                }
            )
    return found


def split_of(identity: str, splits: dict[str, float]) -> str:
    """The split of a person: by the name alone, so that more people move nobody."""
    where = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64
    for name, share in splits.items():
        if where < share:
            return name
        where -= share
    return "train"


def _mark_splits(suspects: list[dict[str, Any]], settings: BuildSettings) -> None:
    """The alarm: what looks like one face, in two splits."""
    for suspect in suspects:
        splits = sorted({split_of(name, settings.splits) for name in suspect["people"]})
        suspect["splits"], suspect["alarm"] = splits, len(splits) > 1
