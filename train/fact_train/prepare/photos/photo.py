"""A photo on its way to a record: decoded, its face chosen, gates, crop; the record's pictures."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from fact_jax.face import (
    CROP_SIZE,
    Face,
    align_face,
    area_weights,
    face_mask,
    head_mask,
)
from fact_jax.face.photo import LONGEST_SIDE
from fact_train.data.records import Example, encode_mask, encode_png
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.photos import measures
from fact_train.prepare.photos.decoder import decoder
from fact_train.prepare.settings import BuildSettings, Gates, RejectedError
from fact_train.prepare.sources import Item

# Photos are JPEGs already: at this quality the loss is below their own noise.
_JPEG = {"quality": 95, "subsampling": 0}


def decode(item: Item, settings: BuildSettings) -> Photo:
    """The photo, upright, in sRGB and shrunk as generation does; RejectedError says why not."""
    if item.problem is not None:
        raise item.problem
    longest = max(LONGEST_SIDE, 2 * settings.size)
    image, (height, width) = decoder()(item.photo, item.name, longest)
    if min(height, width) * 2 < settings.size:
        short, size = min(height, width), settings.size
        line = f"{item.name} is too small: {short} px on its short side for {size} x {size}"
        raise RejectedError("too small", line)
    return Photo(item, image, (height, width))


def choose_face(photo: Photo, faces: list[Face] | None, gates: Gates) -> None:
    """Take the largest face, check the gates, align the crop. RejectedError if one is not met."""
    name = photo.item.name
    if faces is None:
        raise RejectedError(
            "no points", f"no face points for {name}: write them beside it, or give --detector"
        )
    if not faces:
        raise RejectedError("no face", f"no face found in {name}")
    areas = [float((face.box[2] - face.box[0]) * (face.box[3] - face.box[1])) for face in faces]
    largest = int(np.argmax(areas))
    others = areas[:largest] + areas[largest + 1 :]
    photo.faces, photo.face = faces, faces[largest]
    try:
        photo.aligned = align_face(photo.image, photo.face.points, CROP_SIZE)
        found = _measure(photo, max(others, default=0.0) / max(areas[largest], 1e-6))
    except (ValueError, np.linalg.LinAlgError) as error:
        raise RejectedError("points", f"{name}: its points fit no face: {error}") from None
    photo.about |= found
    check_gates(name, found, gates)


def _measure(photo: Photo, second: float) -> dict[str, float]:
    assert photo.face is not None
    assert photo.aligned is not None
    points = (photo.face.points + 0.5) / photo.scale - 0.5
    matrix = measures.similarity_transform(points, measures.ARCFACE_TEMPLATE)
    yaw, pitch, roll = measures.pose(points)
    return {
        "face": CROP_SIZE / float(np.hypot(matrix[0, 0], matrix[1, 0])),
        "sharpness": measures.sharpness(photo.aligned),
        "clipped": measures.clipped(photo.aligned),
        "yaw": yaw,
        "pitch": pitch,
        "roll": roll,
        "second": second,
        "score": photo.face.score,
    }


_AT_LEAST, _AT_MOST = ("face", "sharpness", "score", "quality"), ("clipped", "second")


def check_gates(name: str, found: dict[str, float], gates: Gates) -> None:
    """RejectedError for the first gate that a photo does not pass."""
    for gate, value in found.items():
        limit = getattr(gates, gate)
        if limit is None:
            continue
        angle = gate not in _AT_LEAST and gate not in _AT_MOST
        low = gate in _AT_LEAST and value < limit
        if low or (gate in _AT_MOST and value > limit) or (angle and abs(value) > limit):
            word = "below" if low else "above"
            raise RejectedError(f"gate {gate}", f"{name}: {gate} {value:.4g} is {word} {limit:g}")


def finish(photo: Photo, settings: BuildSettings) -> tuple[Example, dict[str, Any]]:
    """The record and what is known of it; the head is an ellipse where nobody gave a mask."""
    assert photo.face is not None
    if photo.mask is None:
        photo.mask = head_mask(photo.image.shape, photo.face.points).mask
        photo.by["mask"] = "ellipse"
    crop = align_face(photo.image, photo.face.points, settings.crop, photo.mask)
    picture, points, head = square_up(photo, settings.size)
    item, fields = photo.item, photo.item.fields
    example = Example(
        identity=str(fields.get("identity", "")),
        name=item.name,
        photo=picture,
        caption=photo.caption,
        face_mask=encode_mask(face_mask(head, points)),
        head_mask=encode_mask(head),
        crop=encode_png(crop),
        points=points,
    )
    about: dict[str, Any] = {
        "width": photo.full[1],
        "height": photo.full[0],
        "faces": len(photo.faces),
        **{key: round(value, 4) for key, value in photo.about.items()},
        **{key: str(fields[key]) for key in ("licence", "source", "consent") if key in fields},
        "by": photo.by,
    }
    return example, about


def square_up(
    photo: Photo, size: int
) -> tuple[bytes, Float[np.ndarray, "5 2"], Float[np.ndarray, "size size"]]:
    """The largest square around the face, brought to ``size``: JPEG photo, points, head mask.

    Its middle is as near to the middle of the head as the photo's edges allow.
    """
    image, mask = photo.image, photo.mask
    assert mask is not None
    assert photo.face is not None
    height, width = image.shape[:2]
    side = min(height, width)
    rows, columns = (np.flatnonzero(mask.max(axis) > 0.5) for axis in (1, 0))
    top, left = (
        int(np.clip((marked[0] + marked[-1] + 1 - side) / 2, 0, length - side))
        if len(marked)
        else (length - side) // 2
        for marked, length in ((rows, height), (columns, width))
    )
    part = np.s_[top : top + side, left : left + side]
    picture = Image.fromarray(np.ascontiguousarray(image[part]))
    buffer = io.BytesIO()
    picture.resize((size, size), Image.Resampling.LANCZOS).save(buffer, "JPEG", **_JPEG)
    # Coordinates name pixel centres, so the edges are half a pixel out.
    points = (photo.face.points - (left, top) + 0.5) * (size / side) - 0.5
    weights = area_weights(side, size)
    head = np.clip(weights @ mask[part] @ weights.T, 0.0, 1.0)
    return buffer.getvalue(), points.astype(np.float32), head
