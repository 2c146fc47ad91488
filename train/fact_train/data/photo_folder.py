"""Examples from a folder of people: one subfolder a person, its photos with files beside them.

    SRC/anna/1.jpg   1.points.json or 1.json   1.mask.png   1.txt

The five points are needed unless a face detector is installed; the mask (an ellipse is fitted to
the points without it) and the caption are not. The same picture twice is one photo: it would be a
partner that shows nothing new.
"""

import dataclasses
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from fact_jax.face import PreparedFace, area_weights, face_mask, prepare_photo
from fact_jax.face.images import file_error
from fact_jax.portraits import GENERIC_CAPTION
from fact_jax.utils.errors import UserError
from fact_train.data.records import Example, encode_mask, encode_png

SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"),
    *(".heic", ".heif"),  # where pillow-heif is installed; without it each one is told of
)
_BESIDE = (".json", ".txt")
_MASK = ".mask.png"
# What a line about a skipped photo says -> the reason that it is counted under, the first match.
_REASONS = {
    "no face points": "no points",
    "the same picture": "duplicate",
    "too small": "too small",
    "caption": "caption",
    "UTF-8": "caption",
    "pip install pillow-heif": "HEIC",
    "truncated or damaged": "not readable",
    "not an image": "not readable",
    "cannot be read": "not readable",
    "no such file": "not readable",
    "floating-point": "not readable",
    "too large": "too large",
    _MASK: "mask",
    ".json": "points",
}
_MAX_CAPTION = 2000
# Photos are JPEGs already: at this quality the loss is below their own noise.
_JPEG = {"quality": 95, "subsampling": 0}


@dataclasses.dataclass
class Totals:
    """What was left out of a folder: photos ``skipped`` by reason, files ``ignored`` by ending.

    ``loose`` photos lie beside the people's folders, ``nested`` ones in folders within them.
    """

    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    ignored: Counter[str] = dataclasses.field(default_factory=Counter)
    loose: int = 0
    nested: int = 0

    def lines(self) -> Iterator[str]:
        """A line for the user about each kind of file that was left out."""
        if self.skipped:
            yield f"skipped {_counted(self.skipped, 'photo')}"
        if self.ignored:
            yield f"ignored {_counted(self.ignored, 'file')}"
        if self.loose:
            yield f"not looked at: {self.loose} photos of nobody: put each into a person's folder"
        if self.nested:
            yield f"not looked at: {self.nested} photos in folders within a person's: move them up"


def _counted(found: Counter[str], what: str) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in found.most_common())
    return f"{found.total()} {what}{'s' * (found.total() > 1)}: {parts}"


def folder_examples(
    source: Path,
    *,
    size: int,
    crop_size: int,
    warn: Callable[[str], None],
    totals: Totals | None = None,
) -> Iterator[Example]:
    """Every usable photo; ``warn`` gets one line for each photo, or person, that is left out.

    ``totals`` counts what is left out. Raises UserError if ``source`` is no folder with a
    subfolder.
    """
    totals = totals or Totals()
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    people = sorted(path for path in source.iterdir() if path.is_dir() and path.name[0] != ".")
    if not people:
        raise UserError(f"{source} has no subfolder: make one for each person, photos inside")
    totals.loose = sum(map(_is_photo, source.iterdir()))
    seen: dict[tuple[bytes, str], Path] = {}
    for person in people:
        used = 0
        _count_unused(person, totals)
        for photo in sorted(filter(_is_photo, person.iterdir())):
            try:
                example = _example(photo, person.name, size, crop_size, seen, warn)
            except UserError as error:
                text = str(error)
                warn(f"skipped: {text}" if str(photo) in text else f"skipped {photo}: {text}")
                totals.skipped[_reason(text.replace(f"{person}/", ""))] += 1
            else:
                used += 1
                yield example
        if not used:
            warn(f"{person}: skipped, it has no usable photo")
        elif used == 1:
            warn(f"{person}: only one usable photo, nothing to shuffle it with")


def _reason(text: str) -> str:
    return next((reason for part, reason in _REASONS.items() if part in text), "other")


def _is_photo(path: Path) -> bool:
    known = path.suffix.lower() in SUFFIXES and not path.name.endswith(_MASK)
    # A broken link is told of as one; to open a pipe would wait for ever.
    there = path.is_file() or not path.exists()
    return known and path.name[0] != "." and there


def _count_unused(person: Path, totals: Totals) -> None:
    """Files that are neither photos nor beside one, and photos that lie too deep."""
    for folder, _, names in os.walk(person):
        for path in (Path(folder, name) for name in names if name[0] != "."):
            if path.parent != person:
                totals.nested += _is_photo(path)
            elif not _is_photo(path) and not path.name.endswith((*_BESIDE, _MASK)):
                totals.ignored[path.suffix.lower() or "without ending"] += 1


def _example(
    photo: Path,
    identity: str,
    size: int,
    crop_size: int,
    seen: dict[tuple[bytes, str], Path],
    warn: Callable[[str], None],
) -> Example:
    """``seen``: the first usable photo of each picture, by a digest of its pixels and by the person
    (of anybody where that is empty).
    """
    mask = photo.with_suffix(_MASK)
    face = prepare_photo(photo, mask_file=mask if mask.is_file() else None, crop_size=crop_size)
    short = min(face.image.shape[:2])
    if short * 2 < size:
        raise UserError(f"{photo} is too small: {short} px on its short side for {size} x {size}")
    caption = _caption(photo.with_suffix(".txt"))
    digest = hashlib.sha256(str(face.image.shape).encode() + face.image.tobytes()).digest()
    own = seen.setdefault((digest, identity), photo)
    if own != photo:
        raise UserError(f"{photo} is the same picture as {own.name}")
    first = seen.setdefault((digest, ""), photo)
    if first != photo:
        warn(f"{photo}: the same picture as {first}, of another person")
    image, points, head = square_up(face, size)
    return Example(
        identity=identity,
        name=f"{identity}/{photo.name}",
        photo=image,
        caption=caption,
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
        return GENERIC_CAPTION
    try:
        text = " ".join(path.read_text(encoding="utf-8-sig").split())
    except OSError as error:
        raise UserError(file_error(path, error)) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    if not text or len(text) > _MAX_CAPTION:
        raise UserError(f"{path}: a caption has 1 to {_MAX_CAPTION} characters, not {len(text)}")
    return text
