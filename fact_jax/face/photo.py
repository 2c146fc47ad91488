"""Face preprocessing of a photo file: landmarks, head mask, aligned crop."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from fact_jax.face.align import CROP_SIZE, align_face
from fact_jax.face.images import read_image
from fact_jax.face.landmarks import find_face
from fact_jax.face.mask import head_mask, resize_area

LONGEST_SIDE = 1000


class PreparedFace(NamedTuple):
    """A face ready for the encoder; ``points`` and ``mask`` are in pixels of ``image``."""

    image: UInt8[np.ndarray, "h w 3"]
    points: Float[np.ndarray, "5 2"]
    mask: Float[np.ndarray, "h w"]
    crop: UInt8[np.ndarray, "s s 3"]
    notes: tuple[str, ...]


def limit_side(
    image: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "5 2"],
    longest: int = LONGEST_SIDE,
) -> tuple[UInt8[np.ndarray, "height width 3"], Float[np.ndarray, "5 2"]]:
    """Shrink so that no side is over ``longest``; the points go along. Never enlarges.

    Bicubic, sides rounded down, as the released FACT does.
    """
    height, width = image.shape[:2]
    if max(height, width) <= longest:
        return image, np.asarray(points, np.float32)
    scale = longest / max(height, width)
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    small = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BICUBIC)
    ratio = np.array([new_width / width, new_height / height])
    # Coordinates name pixel centres, so the edges are half a pixel out.
    return np.asarray(small), ((points + 0.5) * ratio - 0.5).astype(np.float32)


def prepare_photo(
    path: str | os.PathLike,
    *,
    points_file: str | os.PathLike | None = None,
    mask_file: str | os.PathLike | None = None,
    parsing: str | os.PathLike | Shaped[np.ndarray, "..."] | None = None,
    pack: str | os.PathLike | None = None,
    index: int | None = None,
    crop_size: int = CROP_SIZE,
    longest: int = LONGEST_SIDE,
) -> PreparedFace:
    """Read a photo in sRGB, find its face (``find_face``) and head (``head_mask``), align the crop.

    Points, mask file and parsing map are in pixels of the upright photo as stored; the photo is
    shrunk to ``longest`` after they are applied. ``notes`` are lines that the user should see.
    """
    full = read_image(path, to_srgb=True)
    face, note = find_face(path, full, points_file=points_file, pack=pack, index=index)
    image, points = limit_side(full, face.points, longest)
    if parsing is None and mask_file is None:
        mask, source = head_mask(image.shape, points)
    else:
        mask, source = head_mask(full.shape, face.points, parsing=parsing, mask_file=mask_file)
        if mask.shape != image.shape[:2]:
            mask = np.clip(np.asarray(resize_area(mask, image.shape[:2])), 0.0, 1.0)
    crop = align_face(image, points, crop_size, mask)
    notes = (note,) if note else ()
    return PreparedFace(image, points, mask, crop, (*notes, f"{Path(path)}: head from {source}"))
