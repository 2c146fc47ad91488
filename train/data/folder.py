"""Examples from a folder of people: one subfolder a person, its photos with files beside them.

    SRC/anna/1.jpg   1.points.json or 1.json   1.mask.png   1.txt

The five points are needed unless a face detector is installed; the mask (an ellipse is fitted to
the points without it) and the caption are not.
"""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from fact_jax.errors import UserError
from fact_jax.face import PreparedFace, area_weights, face_mask, prepare_photo
from fact_jax.face.images import file_error
from fact_jax.portraits import NEUTRAL_CAPTION
from train.data.portraits import encode_mask
from train.data.records import Example, encode_png

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_MASK = ".mask.png"
_MAX_CAPTION = 2000
# Photos are JPEGs already: at this quality the loss is below their own noise.
_JPEG = {"quality": 95, "subsampling": 0}


def folder_examples(
    source: Path, *, size: int, crop_size: int, warn: Callable[[str], None]
) -> Iterator[Example]:
    """Every usable photo; ``warn`` gets one line for each photo, or person, that is left out.

    Raises UserError if ``source`` is no folder with a subfolder.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    people = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    if not people:
        raise UserError(f"{source} has no subfolder: make one for each person, photos inside")
    for person in people:
        used = 0
        for photo in _photos(person):
            try:
                example = _example(photo, person.name, size, crop_size)
            except UserError as error:
                warn(_skipped(photo, error))
            else:
                used += 1
                yield example
        if not used:
            warn(f"{person}: skipped, it has no usable photo")
        elif used == 1:
            warn(f"{person}: only one usable photo, nothing to shuffle it with")


def _skipped(photo: Path, error: UserError) -> str:
    text = str(error)
    return f"skipped: {text}" if str(photo) in text else f"skipped {photo}: {text}"


def _photos(person: Path) -> list[Path]:
    return sorted(
        path
        for path in person.iterdir()
        if path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(_MASK)
    )


def _example(photo: Path, identity: str, size: int, crop_size: int) -> Example:
    mask = photo.with_suffix(_MASK)
    face = prepare_photo(photo, mask_file=mask if mask.is_file() else None, crop_size=crop_size)
    short = min(face.image.shape[:2])
    if short * 2 < size:
        raise UserError(f"{photo} is too small: {short} px on its short side for {size} x {size}")
    image, points, head = square_up(face, size)
    return Example(
        identity=identity,
        name=f"{identity}/{photo.name}",
        photo=image,
        caption=_caption(photo.with_suffix(".txt")),
        face_mask=encode_mask(face_mask(head, points)),
        head_mask=encode_mask(head),
        crop=encode_png(face.crop),
        points=points,
    )


def square_up(
    face: PreparedFace, size: int
) -> tuple[bytes, Float[np.ndarray, "5 2"], Float[np.ndarray, "size size"]]:
    """The largest square around the face, brought to ``size``: JPEG photo, points, head mask.

    Its middle is as near to the middle of the head as the photo's edges allow.
    """
    height, width = face.image.shape[:2]
    side = min(height, width)
    rows, columns = (np.flatnonzero(face.mask.max(axis) > 0.5) for axis in (1, 0))
    top, left = (
        int(np.clip((marked[0] + marked[-1] + 1 - side) / 2, 0, length - side))
        if len(marked)
        else (length - side) // 2
        for marked, length in ((rows, height), (columns, width))
    )
    part = np.s_[top : top + side, left : left + side]
    picture = Image.fromarray(np.ascontiguousarray(face.image[part]))
    buffer = io.BytesIO()
    picture.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", **_JPEG)
    # Coordinates name pixel centres, so the edges are half a pixel out.
    points = (face.points - (left, top) + 0.5) * (size / side) - 0.5
    weights = area_weights(side, size)
    head = np.clip(weights @ face.mask[part] @ weights.T, 0.0, 1.0)
    return buffer.getvalue(), points.astype(np.float32), head


def _caption(path: Path) -> str:
    """What a text file beside the photo says, on one line; without one, the neutral caption."""
    if not path.exists():
        return NEUTRAL_CAPTION
    try:
        text = " ".join(path.read_text(encoding="utf-8").split())
    except OSError as error:
        raise UserError(file_error(path, error)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if not text or len(text) > _MAX_CAPTION:
        raise UserError(f"{path}: a caption has 1 to {_MAX_CAPTION} characters, not {len(text)}")
    return text
