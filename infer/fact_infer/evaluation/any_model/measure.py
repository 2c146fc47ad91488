"""Measures of a manifest's pictures, whoever made them."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from fact_infer.evaluation.any_model.manifest import Entry, Shown
from fact_infer.evaluation.any_model.networks import Clip
from fact_infer.evaluation.any_model.observations import Observation, Observer, heads
from fact_infer.evaluation.evaluate import diversity_samples
from fact_infer.evaluation.measures import Copied, Ratio, Samples, identity_samples
from fact_infer.evaluation.page import Case
from fact_jax.face import read_image
from fact_jax.metrics.copying import head_pose
from fact_jax.metrics.identity import angle, assign_faces, copy_paste, cosine, unit
from fact_jax.metrics.intervals import INTERVALS, Estimate
from fact_jax.metrics.pictures import change, fid, kid
from fact_jax.utils.errors import UserError, listed

NOTES = (
    f"{INTERVALS}. Brackets hold the interval. Several pictures of a person count as one.",
    "A person for whom no face was drawn counts as similarity 0 and as a miss of rank-1. Of "
    "several faces each is whose the assignment of greatest similarity to the references says.",
    "'true photo' is the target photo. Of several references their mean direction is compared, for "
    "the copy-paste score the one that is nearest to the picture.",
    "Copied: coefficients of the reference photo's property beside the base picture's, where there "
    "is one. Head: an ellipse around the faces of both pictures.",
)


_SHOWN = {"reference": "reference", "target": "another", "copy-paste": "copy_paste"}


class Row(NamedTuple):
    """A person in a picture; ``entry`` counts pictures."""

    entry: int
    shown: Shown
    person: int


class Measured(NamedTuple):
    """Samples, the person of each row, and what ``results.save`` and the page say of rows."""

    samples: Samples
    who: Int[np.ndarray, " n"]
    rows: list[dict]
    cases: list[Case]


def measure_entries(
    entries: Sequence[Entry], observer: Observer, clip: Clip | None = None
) -> Measured:
    """Everything that the manifest's pictures allow; UserError where photos show no face."""
    names = {one.person: i for i, one in enumerate(_people(entries).values())}
    rows = [Row(i, s, names[s.person]) for i, entry in enumerate(entries) for s in entry.people]
    who = np.asarray([row.person for row in rows])
    files = dict.fromkeys(
        path
        for entry in entries
        for path in (
            entry.picture,
            *([entry.base] if entry.base else []),
            *(p for s in entry.people for p in (*s.references, *([s.target] if s.target else []))),
        )
    )
    seen = {
        path: observer(path)
        for path in tqdm(files, desc="looking", unit="picture", disable=None, file=sys.stderr)
    }
    width = max((o.embeddings.shape[1] for o in seen.values()), default=0)
    photos = _Photos(seen, _people(entries), width)
    faces = {name: _assigned(entries, seen, photos, name) for name in ("fact", "base")}
    samples = {
        **_identity(rows, who, seen, photos, faces),
        **_copied(rows, who, seen, photos, faces),
        **_changes(entries, rows, seen),
        **_text_and_sets(entries, rows, who, seen, photos, clip),
    }
    return Measured(samples, who, _described(entries, rows), _cases(entries, rows, samples))


def _people(entries: Sequence[Entry]) -> dict[str, Shown]:
    """Each person as first shown, in the manifest's order; with a target if there is any."""
    found: dict[str, Shown] = {}
    for entry in entries:
        for one in entry.people:
            known = found.setdefault(one.person, one)
            if known.target is None and one.target is not None:
                found[one.person] = one
    if len(found) < 2:
        raise UserError("an evaluation needs pictures of at least two people")
    return found


class _Photos:
    """What was seen in true photos: the largest face of each."""

    def __init__(self, seen: Mapping[Path, Observation], people: Mapping[str, Shown], width: int):
        self._seen, self.people, self.width = seen, list(people.values()), width

    def face(self, path: Path) -> Float[np.ndarray, " k"]:
        found = self._seen[path].embeddings
        if not len(found):
            raise UserError(f"no face found in {path}: true photos need one")
        return found[0]

    def references(self, one: Shown) -> Float[np.ndarray, "p k"]:
        return np.stack([self.face(path) for path in one.references])

    def reference(self, one: Shown) -> Float[np.ndarray, " k"]:
        return unit(self.references(one).mean(0))

    def target(self, one: Shown) -> Float[np.ndarray, " k"]:
        return np.full(self.width, np.nan) if one.target is None else self.face(one.target)

    def has_targets(self) -> bool:
        return all(one.target is not None for one in self.people)


def _assigned(entries, seen, photos: _Photos, name: str) -> list[tuple[Path, int] | None]:
    """Of each row the picture (or the base's) and the number of its face in it, -1: none."""
    found: list[tuple[Path, int] | None] = []
    for entry in entries:
        path = entry.picture if name == "fact" else entry.base
        if path is None:
            found += [None] * len(entry.people)
        elif not len(embeddings := seen[path].embeddings):
            found += [(path, -1)] * len(entry.people)
        else:
            wanted = np.stack([photos.reference(one) for one in entry.people])
            found += [(path, int(f)) for f in assign_faces(wanted @ embeddings.T)]
    return found


def _embedding(seen, face: tuple[Path, int] | None, width: int) -> Float[np.ndarray, " k"]:
    """Zeros where no face is: similar to nobody. NaN where there is no picture."""
    if face is None:
        return np.full(width, np.nan)
    path, number = face
    return np.zeros(width) if number < 0 else seen[path].embeddings[number].astype(np.float64)


def _identity(rows, who, seen, photos: _Photos, faces) -> Samples:
    count = len(photos.people)
    reference = np.stack([photos.reference(row.shown) for row in rows])
    everybody = np.stack([photos.reference(one) for one in photos.people])
    wrong, targets = np.roll(everybody, -1, axis=0), None
    gallery = everybody
    if photos.has_targets():
        gallery = np.stack([photos.target(one) for one in photos.people])
        shown = _with_targets(rows, who, photos)
        targets = np.stack([photos.target(one) for one in shown])
    elif any(one.target is not None for one in photos.people):
        without = [one.person for one in photos.people if one.target is None]
        print(
            f"note: no target photo of {listed(without)}: nobody is compared with one",
            file=sys.stderr,
        )
    samples: Samples = {}
    for column, own in faces.items():
        if all(face is None for face in own):
            continue
        found = np.stack([_embedding(seen, face, photos.width) for face in own])
        samples |= identity_samples(found, reference, wrong[who], gallery, who, column, targets)
        drawn = np.asarray([face is not None and face[1] >= 0 for face in own])
        samples[f"found/{column}"] = drawn
        if targets is not None:
            near = np.stack(
                [
                    _nearest(f, photos.references(row.shown))
                    for f, row in zip(found, rows, strict=True)
                ]
            )
            scores = copy_paste(angle(found, targets), angle(found, near), angle(targets, near))
            samples[f"copy_paste/{column}"] = np.where(drawn, scores, np.nan)
    if "reference/base" in samples:
        samples["over_base/fact"] = samples["reference/fact"] - samples["reference/base"]  # type: ignore[operator]
    if photos.has_targets():
        true = identity_samples(gallery, everybody, wrong, everybody, np.arange(count), "true")
        # The mean over rows takes the first rows' people: one row a person, in order.
        samples |= {key: np.asarray(value)[who] for key, value in true.items()}
    return samples


def _with_targets(rows, who, photos: _Photos) -> list[Shown]:
    """Whom each row shows; without a target photo of its own, with another row's of the person."""
    return [
        photos.people[person] if row.shown.target is None else row.shown
        for row, person in zip(rows, who, strict=True)
    ]


def _nearest(found: np.ndarray, references: Float[np.ndarray, "p k"]) -> Float[np.ndarray, " k"]:
    return references[int(np.argmax(cosine(found[None], references)))]


def _copied(rows, who, seen, photos: _Photos, faces) -> Samples:
    def properties(places: Sequence[tuple[Path, int] | None]) -> dict[str, np.ndarray]:
        points = np.full((len(places), 5, 2), np.nan)
        light = np.full(len(places), np.nan)
        for i, face in enumerate(places):
            if face is not None and face[1] >= 0:
                points[i] = seen[face[0]].points[face[1]]
                light[i] = seen[face[0]].light[face[1]]
        return {**head_pose(points), "light": light}

    reference = properties([(row.shown.references[0], 0) for row in rows])
    base = properties(faces["base"])
    with_base = any(face is not None for face in faces["base"])
    sources = {"fact": properties(faces["fact"])}
    if with_base:
        sources["base"] = base
    if photos.has_targets():
        shown = _with_targets(rows, who, photos)
        sources["true"] = properties([(one.target, 0) for one in shown if one.target is not None])
    return {
        f"copied/{name}/{column}": Copied(
            values, reference[name], base[name] if with_base else None
        )
        for column, found in sources.items()
        for name, values in found.items()
    }


def _changes(entries, rows, seen) -> Samples:
    """Change of pixels inside and outside of the heads, where there are base pictures."""
    if all(entry.base is None for entry in entries):
        return {}
    parts = np.full((len(entries), 2), np.nan)
    for i, entry in enumerate(entries):
        if entry.base is None:
            continue
        one, other = (read_image(path, to_srgb=True) for path in (entry.picture, entry.base))
        if one.shape != other.shape:
            raise UserError(f"{entry.picture} and its base {entry.base} are not of one size")
        points = np.concatenate([seen[entry.picture].points, seen[entry.base].points])
        parts[i] = [
            float(x[0]) for x in change(one[None], other[None], heads(points, one.shape)[None])
        ]
    inside, outside = parts[[row.entry for row in rows]].T
    return {
        "head/inside/fact": inside,
        "head/outside/fact": outside,
        "head/ratio/fact": Ratio(outside, inside),
    }


def _text_and_sets(entries, rows, who, seen, photos: _Photos, clip: Clip | None) -> Samples:
    samples: Samples = {}
    of_row = np.asarray([row.entry for row in rows])
    groups: dict[tuple, int] = {}
    for entry in entries:
        key = (entry.prompt, *sorted(one.person for one in entry.people))
        groups.setdefault(key, len(groups))
    group = np.asarray(
        [groups[(e.prompt, *sorted(one.person for one in e.people))] for e in entries]
    )
    truth = [row.shown.target or row.shown.references[0] for row in rows]
    for column, get in (("fact", lambda e: e.picture), ("base", lambda e: e.base)):
        paths = [get(entry) for entry in entries]
        if any(path is None for path in paths):
            continue
        if clip is not None and all(entry.prompt is not None for entry in entries):
            texts = clip.texts([entry.prompt for entry in entries])
            pictures = np.stack([seen[path].clip for path in paths])
            samples[f"clip/{column}"] = cosine(pictures, texts)[of_row]
        features = [seen[path].features for path in paths]
        if features[0].size:
            x = np.stack(features)[of_row]
            y = np.stack([seen[path].features for path in truth])
            samples[f"kid/{column}"] = kid(x, y)
            samples[f"fid/{column}"] = Estimate(fid(x, y), np.nan, np.nan, len(x))
        if len(groups) < len(entries):
            samples |= _diversity(paths, features, group, of_row, column)
    return samples


def _diversity(paths, features, group, of_row, column: str) -> Samples:
    """Of each request over its seeds; a row has its request's number."""
    found: Samples = {}
    shapes = {read_image(path).shape for path in paths}
    if len(shapes) > 1:
        return found
    values: dict[str, np.ndarray] = {}
    for number in range(int(group.max()) + 1):
        own = np.flatnonzero(group == number)
        pictures = np.stack([read_image(paths[i], to_srgb=True) for i in own])
        rows = np.stack([features[i] for i in own]) if features[0].size else None
        one = diversity_samples(pictures, rows, np.zeros(len(own), int), column)
        for key, value in one.items():
            values.setdefault(key, np.full(len(paths), np.nan))[own] = np.asarray(value)[0]
    return {key: value[of_row] for key, value in values.items()}


def _described(entries, rows) -> list[dict]:
    return [
        {
            "picture": str(entries[row.entry].picture),
            "person": row.shown.person,
            "prompt": entries[row.entry].prompt,
            "seed": entries[row.entry].seed,
        }
        for row in rows
    ]


def _cases(entries, rows, samples: Samples) -> list[Case]:
    """Rows of the page, by the similarity to the target or, without one, to the reference."""
    key = sorted_by(samples)
    cases = []
    for i, row in enumerate(rows):
        entry = entries[row.entry]
        files = {"reference": row.shown.references[0], "base": entry.base, "picture": entry.picture}
        files["target"] = row.shown.target
        pictures = {n: _reader(path) for n, path in files.items() if path is not None}
        scores = [
            f"{label} {value[i]:.3f}"
            for label, name in _SHOWN.items()
            if isinstance(value := samples.get(f"{name}/fact"), np.ndarray)
        ]
        seed = [] if entry.seed is None else [f"seed {entry.seed}"]
        prompt = [entry.prompt] if entry.prompt else []
        about = [", ".join([row.shown.person, *seed]), *prompt, ", ".join(scores)]
        drawn = bool(np.asarray(samples["found/fact"])[i])
        cases.append(Case(pictures, float(np.asarray(samples[key])[i]) if drawn else None, about))
    return cases


def sorted_by(samples: Samples) -> str:
    """The measure by which pictures are ranked."""
    return "another/fact" if "another/fact" in samples else "reference/fact"


def _reader(path: Path):
    return lambda: read_image(path, to_srgb=True)
