"""Aligned crops from photos, by the same code as in training."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

from fact_infer.request import Photo
from fact_jax.face import (
    PreparedFace,
    align_face,
    checked_face,
    draw_face,
    find_face_in,
    head_mask,
    limit_side,
    prepare_photo,
)


def prepare_face(photo: Photo, size: int) -> PreparedFace:
    """One photo's face, its crop ``size`` pixels a side."""
    return prepare_photo(
        photo.path,
        points_file=photo.points,
        mask_file=photo.mask,
        parsing=photo.parsing,
        pack=photo.pack,
        index=photo.index,
        crop_size=size,
    )


def prepare_crops(
    photos: Sequence[Photo], size: int
) -> tuple[UInt8[np.ndarray, "p s s 3"], list[str]]:
    """The crops of all photos, and the lines that the user should see about them."""
    faces = [prepare_face(photo, size) for photo in photos]
    return np.stack([face.crop for face in faces]), [note for face in faces for note in face.notes]


def visualize_face(face: PreparedFace) -> UInt8[np.ndarray, "h w 3"]:
    """The photo with points and mask, and beside it the crop, as high as the photo."""
    drawn = draw_face(face.image, face.points, face.mask)
    side = len(drawn)
    crop = Image.fromarray(face.crop).resize((side, side), Image.Resampling.BICUBIC)
    return np.concatenate([drawn, np.asarray(crop)], axis=1)


def crop_picture(
    picture: Image.Image | UInt8[np.ndarray, "h w 3"], size: int, points: object = None
) -> tuple[UInt8[np.ndarray, "s s 3"], str]:
    """The crop of a picture in memory, and a line that the user should see ("": none).

    ``points`` are its five, or None: the largest face that the installed detector sees.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    if points is None:
        face, note = find_face_in(picture)
    else:
        face, note = checked_face({"points": points}, "the points of the face"), ""
    image, own = limit_side(picture, face.points)
    return align_face(image, own, size, head_mask(image.shape, own).mask), note
