"""Decisions over all photos: near-duplicates, identities, splits, suspected label errors."""

import dataclasses
import hashlib
import itertools
import re
from array import array
from collections import defaultdict
from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Int8
from scipy.cluster.hierarchy import fcluster, linkage

from fact_train.prepare.pairs import Groups, cosines
from fact_train.prepare.settings import BuildSettings
from fact_train.prepare.store import Store
from fact_train.prepare.table import NpyWriter, Table, open_npy

MADE_UP = re.compile(r"person-\d{7,}")
"""Names of people who have no label and are known by their faces."""
_LARGEST = 4000
"""Photos of a group that is looked at as a whole; a larger one stays as its pairs join it."""


@dataclasses.dataclass
class Decisions:
    """What becomes of each record of ``table``."""

    table: Table
    people: list[str]
    person: Int[np.ndarray, " n"]
    """Of ``people``; a copy is of the one that is kept."""
    kept: Int[np.ndarray, " n"]
    """The record that is kept in place of a copy, itself where it is unusable, else -1."""
    counts: Int[np.ndarray, " people"]
    """Photos of each of ``people``, without copies; who has fewer than ``least`` is left out."""
    least: int
    removed: Bool[np.ndarray, " people"]
    """Who was removed from the set before, by name; their photos are left out too."""
    suspects: list[dict[str, Any]]

    def identity(self, record: int) -> str:
        return self.people[self.person[record]]

    @property
    def written(self) -> Int[np.ndarray, " k"]:
        """The records that are."""
        staying = (self.counts >= self.least) & ~self.removed
        return np.flatnonzero((self.kept < 0) & staying[self.person])

    def rejected(self, record: int) -> tuple[str, str] | None:
        """Reason and line of a record that is not written."""
        names, best = self.table.names, self.kept[record]
        if self.removed[self.person[record]]:
            return removed_photo(names[record])
        if best == record:
            usual = self.table.embeddings.shape[1]
            line = f"{names[record]}: its embedding has {self.table.misfits[record]} numbers"
            return "embedding", f"{line}, most have {usual}"
        if best >= 0:
            return "duplicate", f"{names[record]} is the same picture as {names[best]}"
        if (count := self.counts[self.person[record]]) >= self.least:
            return None
        line = f"{names[record]}: {self.identity(record)} has {count} usable photos"
        return "few photos", f"{line}, {self.least} are needed"


@dataclasses.dataclass(frozen=True)
class Units:
    """What is compared by face: a labelled person's mean, or a photo without a label."""

    vectors: Int8[np.ndarray, "u d"]
    person: Int[np.ndarray, " u"]
    """The labelled person, or -1."""
    record: Int[np.ndarray, " u"]
    """The photo, or -1."""


def write_units(table: Table, store: Store, plan: str) -> Units:
    """People and unlabelled photos that have an embedding; their vectors in ``PLAN/face.npy``."""
    people = array("i")
    alone = np.flatnonzero(table.label[table.embedded] < 0)
    name = f"{plan}/face.npy"
    with (
        store.writing(name) as path,
        open(path, "wb") as opened,
        NpyWriter(opened, np.int8, table.embeddings.shape[1]) as vectors,
    ):
        for person, group in table.labelled():
            people.append(person)
            vectors.append(_mean(table.embeddings[group]))
        for one in alone:
            vectors.append(table.embeddings[one])
    nobody = np.full(len(alone), -1, np.intc)
    return Units(
        open_npy(store, name),
        np.concatenate([people, nobody]).astype(np.intc),
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
    removed: Container[str] = (),
) -> Decisions:
    """Copies are rejected but for the best; who has no label is named by face; the rest is told.

    Pairs are looped over twice. ``removed`` are SHA-256 of the names of people who are left out; a
    name that was made up for photos without a label may be another's in each build, and is kept.
    """
    copies, label = Groups(len(table)), table.label.copy()
    for pair in same_picture:
        # Whose the groups are: an unlabelled copy does not join two people's.
        one, other = sorted(map(copies.find, pair))
        if min(label[one], label[other]) < 0 or label[one] == label[other]:
            label[one] = max(label[one], label[other])
            copies.join(one, other)
    kept = np.full(len(table), -1, np.intc)
    kept[list(table.misfits)] = list(table.misfits)
    for group in copies.members().values():
        # A labelled copy before one without, then the better one, then the first.
        best = max(group, key=lambda i: (table.label[i] >= 0, *table.rank[i], -i))
        kept[group] = best
        kept[best] = -1
    people, person = _name_people(table, units, same_face, settings)
    person = np.where(kept < 0, person, person[kept])
    counts = np.bincount(person[kept < 0], minlength=len(people))
    gone = np.array(
        [
            (number < len(table.labels) or MADE_UP.fullmatch(name) is None)
            and name_digest(name) in removed
            for number, name in enumerate(people)
        ],
        bool,
    )
    decisions = Decisions(table, people, person, kept, counts, settings.min_photos, gone, [])
    decisions.suspects += _suspects(decisions, units, same_picture, same_face)
    decisions.suspects += _disagreeing(decisions, settings)
    out = {people[number] for number in np.flatnonzero(gone)}
    decisions.suspects = [one for one in decisions.suspects if not out & {*one["people"]}]
    _mark_splits(decisions.suspects, settings)
    return decisions


def removed_photo(name: str) -> tuple[str, str]:
    """Reason and line of a photo of a person who was removed."""
    return "removed", f"{name} is of a person who was removed from this set, log.jsonl says when"


def name_digest(person: str) -> str:
    """What the log keeps of a removed person's name."""
    return hashlib.sha256(person.encode()).hexdigest()


def _name_people(
    table: Table, units: Units, pairs: Iterable[tuple[int, int]], settings: BuildSettings
) -> tuple[list[str], Int[np.ndarray, " n"]]:
    """Names, and whose each record is: by its label, else by its face, else its own."""
    people = {name: number for number, name in enumerate(table.labels)}
    person = table.label.copy()
    groups = Groups(len(units.person))
    for one, other in pairs:
        if units.person[one] < 0 and units.person[other] < 0:
            groups.join(one, other)
    named: dict[int, list[int]] = defaultdict(list)
    for one in np.flatnonzero(units.person < 0).tolist():
        named[groups.find(one)].append(one)
    # No label is given to somebody else.
    free = (name for i in itertools.count(1) if (name := f"person-{i:07d}") not in people)
    for group in named.values():
        for part in _tight(group, units.vectors, settings.same_face):
            person[units.record[part]] = people.setdefault(next(free), len(people))
    for one in np.flatnonzero(person < 0).tolist():
        name = f"only {table.names[one]}"
        while name in people:  # a label's, or that of another photo of the same name
            name = f"only {name}"
        person[one] = people.setdefault(name, len(people))
    return list(people), person


def _suspects(
    decisions: Decisions,
    units: Units,
    same_picture: Iterable[tuple[int, int]],
    same_face: Iterable[tuple[int, int]],
) -> list[dict[str, Any]]:
    """What looks alike, but is not one person's."""
    table = decisions.table
    labels, first = np.unique(table.label, return_index=True)
    # Of a labelled person, the first record stands for all.
    stands = units.record.copy()
    labelled = units.person >= 0
    stands[labelled] = first[np.searchsorted(labels, units.person[labelled])]
    alike = itertools.chain(
        (("same picture", *pair) for pair in same_picture),
        (("same face", int(stands[one]), int(stands[other])) for one, other in same_face),
    )
    return [
        {
            "kind": kind,
            "photos": [table.names[one], table.names[other]],
            "people": [decisions.identity(one), decisions.identity(other)],
        }
        for kind, one, other in alike
        if decisions.person[one] != decisions.person[other]
    ]


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


def _disagreeing(decisions: Decisions, settings: BuildSettings) -> list[dict[str, Any]]:
    """Labelled photos whose face is unlike the mean of the person's others."""
    found, table = [], decisions.table
    for person, group in table.labelled():
        used = group[decisions.kept[table.embedded[group]] < 0]
        if len(used) < 2:
            continue
        faces = _unit(table.embeddings[used])
        others = faces.sum(0) - faces
        cosine = (faces * others).sum(1) / np.maximum(np.linalg.norm(others, axis=1), 1e-9)
        for i in np.flatnonzero(cosine < settings.other_face):
            found.append(
                {
                    "kind": "disagrees",
                    "photos": [table.names[table.embedded[used[i]]]],
                    "people": [table.labels[person]],
                    "cosine": round(float(cosine[i]), 4),
                }
            )
    return found


def split_of(identity: str, splits: dict[str, float]) -> str:
    """The split of a person: by the name alone, so that more people move nobody.

    In whatever order the splits are given.
    """
    where = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") / 2**64
    for name, share in sorted(splits.items()):
        if where < share:
            return name
        where -= share
    return "train"


def _mark_splits(suspects: list[dict[str, Any]], settings: BuildSettings) -> None:
    """The alarm: what looks like one face, in two splits."""
    for suspect in suspects:
        splits = sorted({split_of(name, settings.splits) for name in suspect["people"]})
        suspect["splits"], suspect["alarm"] = splits, len(splits) > 1
