"""Examples from the procedural portrait world, a few people at a time."""

from collections.abc import Iterator

import numpy as np

from fact_jax.portraits import SPLITS
from fact_jax.utils.errors import UserError
from fact_train.data.records import Example, encode_png
from fact_train.tasks.common import align_portraits, draw_portraits

_PEOPLE_AT_ONCE = 32


def portrait_examples(
    split: str, people: int, photos: int, *, size: int, crop_size: int
) -> Iterator[Example]:
    """``photos`` of each of a split's first ``people``: the portraits that the tasks draw."""
    if people > len(SPLITS[split]):
        raise UserError(
            f"the split {split} has {len(SPLITS[split])} people, {people} were asked for"
        )
    for first in range(0, people, _PEOPLE_AT_ONCE):
        some = min(_PEOPLE_AT_ONCE, people - first)
        batch = draw_portraits(split, some, photos, size=size, first=first)
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


def encode_mask(mask: np.ndarray) -> bytes:
    """A mask in [0, 1] as a grey PNG file."""
    return encode_png(np.rint(255 * np.clip(mask, 0.0, 1.0)).astype(np.uint8))
