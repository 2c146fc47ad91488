"""A photo on its way to a record: decoded, its face chosen, gates, crop; the record's pictures."""

import io
from collections.abc import Sequence
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
    if (narrow := min(image.shape[:2])) * 2 < settings.size:
        line = f"{item.name} is too narrow: of {width} x {height}, shrunk to {longest} px, {narrow}"
        raise RejectedError("too small", f"{line} px are left for {settings.size}")
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
    picture, points, head = cut_out(photo, settings.shapes)
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
    if settings.buckets:
        about["shape"] = list(head.shape)
    return example, about


def cut_out(
    photo: Photo, shapes: Sequence[tuple[int, int]]
) -> tuple[bytes, Float[np.ndarray, "5 2"], Float[np.ndarray, "h w"]]:
    """The largest part around the face of one of the shapes: JPEG photo, points, head mask.

    Of the (height, width) in ``shapes`` it is the one nearest to the photo's ratio that holds the
    head and the points, else just the nearest. The middle of the part is as near to the middle of
    the head as the photo's edges allow.
    """
    image, mask = photo.image, photo.mask
    assert mask is not None
    assert photo.face is not None
    ratio = np.log(image.shape[0] / image.shape[1])
    nearest = sorted(shapes, key=lambda shape: abs(np.log(shape[0] / shape[1]) - ratio))
    ends = [
        (marked[0], marked[-1] + 1) if len(marked) else (0, length)
        for axis, length in ((1, image.shape[0]), (0, image.shape[1]))
        for marked in (np.flatnonzero(mask.max(axis) > 0.5),)
    ]
    parts = [_around(ends, image.shape[:2], shape) for shape in nearest]
    needed = photo.face.points[:, ::-1]
    whole = [
        all(
            start <= min(low, inside.min()) and max(high, inside.max() + 1) <= start + side
            for (start, side), (low, high), inside in zip(part, ends, needed.T, strict=True)
        )
        for part in parts
    ]
    chosen = whole.index(True) if any(whole) else 0
    (top, high), (left, wide) = parts[chosen]
    height, width = nearest[chosen]
    part = np.s_[top : top + high, left : left + wide]
    picture = Image.fromarray(np.ascontiguousarray(image[part]))
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", **_JPEG)
    # Coordinates name pixel centres, so the edges are half a pixel out.
    scale = (width / wide, height / high)
    points = (photo.face.points - (left, top) + 0.5) * scale - 0.5
    head = area_weights(high, height) @ mask[part] @ area_weights(wide, width).T
    return buffer.getvalue(), points.astype(np.float32), np.clip(head, 0.0, 1.0)


def _around(
    ends: Sequence[tuple[int, int]], lengths: Sequence[int], shape: tuple[int, int]
) -> list[tuple[int, int]]:
    """(start, side) along both axes of the largest part of that ratio, around the ends' middle."""
    scale = min(length / side for length, side in zip(lengths, shape, strict=True))
    sides = [round(side * scale) for side in shape]
    return [
        (int(np.clip((low + high - side) / 2, 0, length - side)), side)
        for (low, high), length, side in zip(ends, lengths, sides, strict=True)
    ]
