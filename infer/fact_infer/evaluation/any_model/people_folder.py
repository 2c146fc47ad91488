"""Pictures of a folder of people by a base and an adapter, as a manifest.

PEOPLE/NAME/*.jpg: the first photos of each person are seen by the model, the last is the target.
"""

import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from fact_infer.evaluation.any_model.manifest import Entry, Shown
from fact_infer.evaluation.any_model.observations import Observer, heads
from fact_infer.evaluation.leakage import Leakage
from fact_infer.evaluation.measures import Samples
from fact_infer.evaluation.results import PictureStore
from fact_infer.jax.pipeline import FlaxPipeline
from fact_infer.photos import prepare_crops
from fact_infer.request import MAX_PICTURES, MAX_SEED, GenerationParams, Photo, check_prompt
from fact_jax.face import prepare_photo, read_image
from fact_jax.utils.batches import padded_batches
from fact_jax.utils.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic")
_MASK = ".mask.png"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """A person with aligned crops of the photos that the model sees."""

    shown: Shown
    photos: tuple[Photo, ...]


def read_people(
    folder: Path, photos: int, count: int | None, pack: str | None = None
) -> list[Person]:
    """The first ``count`` people of a folder (all for None); UserError if there are none.

    A mask ``NAME.mask.png`` beside a photo is used. People with fewer than ``photos`` photos are
    told of and left out; who has no more than that many has no target.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder of people")
    people = []
    for own in sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."):
        files = sorted(
            p
            for p in own.iterdir()
            if p.suffix.lower() in SUFFIXES and not p.name.endswith(_MASK) and p.is_file()
        )
        if len(files) < photos:
            print(f"note: {own}: left out, {len(files)} photo(s) of {photos}", file=sys.stderr)
            continue
        target = files[-1] if len(files) > photos else None
        used = tuple(Photo(path=p, mask=_mask_of(p), pack=pack) for p in files[:photos])
        shown = Shown(
            person=own.name, references=tuple(photo.path for photo in used), target=target
        )
        people.append(Person(shown=shown, photos=used))
        if len(people) == count:
            break
    if len(people) < 2:
        raise UserError(
            f"{folder}: photos of at least two people are needed, each in a folder of its own"
        )
    return people


def _mask_of(photo: Path) -> Path | None:
    mask = photo.with_suffix(_MASK)
    return mask if mask.is_file() else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everybody with every prompt and every seed; the base draws each prompt and seed once."""

    people: Sequence[Person]
    prompts: Sequence[str]
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        for prompt in self.prompts:
            check_prompt(prompt)
        if len(self.rows()) > MAX_PICTURES:
            raise UserError(f"at most {MAX_PICTURES:,} pictures, these are {len(self.rows()):,}")
        if self.seeds[-1] > MAX_SEED:
            raise UserError(f"seeds must lie in 0..{MAX_SEED}, got {self.seeds[-1]}")

    def rows(self) -> list[tuple[int, int, int]]:
        """(person, prompt, seed) of every picture, by number."""
        return [
            (i, j, k)
            for i in range(len(self.people))
            for j in range(len(self.prompts))
            for k in range(len(self.seeds))
        ]

    def key(self, row: tuple[int, int, int]) -> str:
        i, j, k = row
        name = self.people[i].shown.person
        return f"fact/{safe_name(name)}-{j}-{self.seeds[k]}"

    def base_key(self, row: tuple[int, int, int]) -> str:
        return f"base/{row[1]}-{self.seeds[row[2]]}"


def safe_name(name: str) -> str:
    """A file's name for a person's; what a file cannot be called goes, a digest comes."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)[:60]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def draw(
    pipeline: FlaxPipeline, plan: Plan, params: GenerationParams, store: PictureStore, batch: int
) -> list[Entry]:
    """Draw what is not in the store; a line of progress a batch."""
    crops_of, rows = _crops(pipeline, plan), plan.rows()
    first = {plan.base_key(row): row for row in rows}
    for name, own, keys in (
        ("base", list(first.values()), list(first)),
        ("fact", rows, [plan.key(row) for row in rows]),
    ):
        missing = [i for i, key in enumerate(keys) if not store.have([key])]
        for part, count in padded_batches(len(missing), min(batch, max(len(missing), 1))):
            chosen = [own[missing[i]] for i in part]
            crops = None
            if name == "fact":
                crops = np.stack([crops_of(i) for i, _, _ in chosen])
            pictures = pipeline.generate(
                [plan.prompts[j] for _, j, _ in chosen],
                [plan.seeds[k] for _, _, k in chosen],
                crops,
                params,
            )
            store.write([keys[missing[i]] for i in part[:count]], pictures[:count])
            done = part[:count][-1] + 1
            print(f"{name} pictures: {done} of {len(missing)}", file=sys.stderr, flush=True)
    return [
        Entry(
            picture=store.path(plan.key(row)),
            people=(plan.people[row[0]].shown,),
            prompt=plan.prompts[row[1]],
            base=store.path(plan.base_key(row)),
            seed=plan.seeds[row[2]],
        )
        for row in rows
    ]


def leaked(
    pipeline: FlaxPipeline, plan: Plan, store: PictureStore, observer: Observer, batch: int
) -> Samples:
    """Leakage inside the model of every picture; heads are ellipses around the faces."""
    crops_of, leak = _crops(pipeline, plan), Leakage(pipeline, batch)
    pieces: list[Samples] = []
    rows = plan.rows()
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        names = {"fact": [plan.key(r) for r in part], "base": [plan.base_key(r) for r in part]}
        pictures = {name: store.read(keys) for name, keys in names.items()}
        masks = []
        for keys in zip(*names.values(), strict=True):
            points = [observer(store.path(key)).points for key in keys]
            masks.append(heads(np.concatenate(points), pictures["fact"].shape[1:]))
        pieces.append(
            leak(
                [plan.prompts[j] for _, j, _ in part],
                [plan.seeds[k] for _, _, k in part],
                np.stack([crops_of(i) for i, _, _ in part]),
                pictures,
                np.stack(masks),
            )
        )
    return {key: np.concatenate([np.asarray(p[key]) for p in pieces]) for key in pieces[0]}


def _crops(pipeline: FlaxPipeline, plan: Plan) -> Callable[[int], UInt8[np.ndarray, "k s s 3"]]:
    """A person's number to the crops of their photos, which are read once."""
    assert pipeline.face is not None  # --adapter is required
    size = pipeline.face.encoder_config.img_size
    return functools.cache(lambda person: prepare_crops(plan.people[person].photos, size)[0])


def check_photos(people: Sequence[Person]) -> None:
    """UserError for the first photo that the model is to see and in which no face is found.

    And for a target photo that cannot be read, before hours of drawing rather than after.
    """
    for person in people:
        for photo in person.photos:
            prepare_photo(photo.path, mask_file=photo.mask, pack=photo.pack)
        if person.shown.target is not None:
            read_image(person.shown.target)
