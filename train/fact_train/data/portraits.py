"""Photos from the procedural portrait world: in memory, and as examples for records."""

from collections.abc import Callable, Iterator
from typing import Annotated

import numpy as np
from jaxtyping import UInt8

from fact_jax.face import align_batch
from fact_jax.portraits import SPLITS, Batch, make_batch
from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import Range
from fact_train.data.records import Example, encode_mask, encode_png

_MAX_PHOTOS = 1000
Photos = Annotated[int, Range(1, _MAX_PHOTOS)]
"""Type of a setting: how many photos of each person."""
_PHOTOS_AT_ONCE = 512
"""As many as ``make_batch`` draws at once on an accelerator."""


def people_of(split: str, at_least: int = 1) -> Range:
    """Range of a setting: how many people of a split of the portrait world."""
    return Range(at_least, len(SPLITS[split]))


def draw_portraits(
    split: str, people: int, photos: int, offset: int = 0, size: int = 64, first: int = 0
) -> Batch:
    """``people`` x ``photos`` portraits of a split's people from ``first`` on, sorted by person.

    No two portraits of the whole world share a scene seed: it is the person's number times 1,000
    plus the number of the photo.
    """
    ids = np.asarray(SPLITS[split][first : first + people])
    if len(ids) < people:
        raise ValueError(f"split {split!r} has {len(ids)} people there, not {people}")
    seeds = (ids[:, None] * _MAX_PHOTOS + offset + np.arange(photos)).reshape(-1)
    return make_batch(np.repeat(ids, photos), seeds, size)


def portrait_batches(split: str, people: int, photos: int, *, size: int) -> Iterator[Batch]:
    """:func:`draw_portraits`, some people after others.

    All together would take about 1 MB a photo of 128 x 128 pixels while they are drawn.
    """
    at_once = max(1, _PHOTOS_AT_ONCE // photos)
    for first in range(0, people, at_once):
        some = min(at_once, people - first)
        yield draw_portraits(split, some, photos, size=size, first=first)


def portrait_arrays(
    split: str,
    people: int,
    photos: int,
    describe: Callable[[Batch], dict[str, np.ndarray]],
    *,
    size: int,
) -> dict[str, np.ndarray]:
    """What ``describe`` gives of :func:`portrait_batches`, joined along the first axis."""
    pieces = [describe(batch) for batch in portrait_batches(split, people, photos, size=size)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def align_portraits(batch: Batch, size: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Aligned crops of portraits with everything but the head black, as FACT's encoder wants."""
    return align_batch(batch.images, batch.portrait.points, batch.portrait.head_mask, size)


def draw_crops(
    split: str, people: int, photos: int, crop_size: int, size: int = 64
) -> UInt8[np.ndarray, "n s s 3"]:
    """Aligned crops of pictures of a split's first people, sorted by person."""
    batches = portrait_batches(split, people, photos, size=size)
    return np.concatenate([align_portraits(batch, crop_size) for batch in batches])


def portrait_examples(
    split: str, people: int, photos: int, *, size: int, crop_size: int
) -> Iterator[Example]:
    """``photos`` of each of a split's first ``people``: the portraits that the tasks draw."""
    if people > len(SPLITS[split]):
        raise UserError(
            f"the split {split} has {len(SPLITS[split])} people, {people} were asked for"
        )
    for batch in portrait_batches(split, people, photos, size=size):
        crops = align_portraits(batch, crop_size)
        points = np.asarray(batch.portrait.points, np.float32)
        for i, image in enumerate(batch.images):
            yield Example(
                identity=f"{split}-{batch.ids[i]}",
                name=f"{split}-{batch.ids[i]}-{i % photos}",
                photo=encode_png(image),
                caption=batch.captions[i],
                face_mask=encode_mask(batch.portrait.face_mask[i]),
                head_mask=encode_mask(batch.portrait.head_mask[i]),
                crop=encode_png(crops[i]),
                points=points[i],
            )
