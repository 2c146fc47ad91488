"""Photos of made-up people as files, each with its points and head mask beside it."""

import functools
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from fact_jax.portraits import SPLITS, make_batch
from fact_jax.utils.errors import UserError
from fact_jax.utils.files import create

_SUFFIXES = (".mask.png", ".points.json", ".png")
_LARGEST = 1024


def write_portraits(split: str, people: int, photos: int, out: Path, size: int = 128) -> list[Path]:
    """Write ``PERSON-PHOTO.png``, ``.points.json`` and ``.mask.png``; gives the photos' paths.

    The first people of a split; those of ``test`` are in no training set. Where one of a photo's
    three names is taken all three get a number (``PERSON-PHOTO-2.png``). ``size`` is in pixels.
    """
    if not 1 <= people <= len(SPLITS[split]):
        raise UserError(f"people must be 1 to {len(SPLITS[split])}, got {people}")
    if not 1 <= photos <= 100:
        raise UserError(f"photos must be 1 to 100, got {photos}")
    if not 32 <= size <= _LARGEST:
        raise UserError(f"size must be 32 to {_LARGEST} pixels, got {size}")
    ids = np.asarray(SPLITS[split][:people])
    numbers = np.arange(photos)
    batch = make_batch(np.repeat(ids, photos), (ids[:, None] * 1000 + numbers).reshape(-1), size)
    paths = []
    for i, image in enumerate(batch.images):
        name = _free_name(out, f"{batch.ids[i]:06d}-{i % photos}")
        mask = np.rint(255 * batch.portrait.head_mask[i]).astype(np.uint8)
        _save(mask, out / f"{name}.mask.png")
        points = {"points": np.round(batch.portrait.points[i].astype(float), 3).tolist()}
        write = functools.partial(Path.write_text, data=json.dumps(points) + "\n")
        create(out / f"{name}.points.json", write)
        paths.append(_save(image, out / f"{name}.png"))
    return paths


def _free_name(out: Path, name: str) -> str:
    number, free = 1, name
    while any(os.path.lexists(out / f"{free}{suffix}") for suffix in _SUFFIXES):
        number += 1
        free = f"{name}-{number}"
    return free


def _save(pixels: np.ndarray, path: Path) -> Path:
    return create(path, lambda temporary: Image.fromarray(pixels).save(temporary, format="PNG"))
