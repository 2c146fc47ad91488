"""Answers from the columns of a table and the files beside a photo."""

import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from fact_jax.face import Face, area_weights
from fact_jax.face.images import ImageBytes, one_line
from fact_jax.face.landmarks import check_inside, is_about_points, parse_faces
from fact_jax.face.mask import head_mask
from fact_jax.utils.errors import UserError
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.settings import RejectedError

_MAX_CAPTION = 2000
_MAX_JSON = 1 << 20
_MAX_DIMENSIONS = 1024


class SideFiles:
    """One role's answers from what lies beside a photo, read by ``read``."""

    def __init__(self, role: str, read: Callable[[Photo], Any]):
        self.name, self._role, self._read = "side file or column", role, read

    def __call__(self, photos: Sequence[Photo]) -> list[Any]:
        answers = []
        for photo in photos:
            try:
                answers.append(self._read(photo))
            except (
                UserError,
                ValueError,
                TypeError,
                ArithmeticError,
                RecursionError,
                OSError,
                EOFError,
                zipfile.BadZipFile,
                MemoryError,
            ) as error:
                text = one_line(error)
                name = photo.item.name
                line = text if name in text else f"{name}: its {self._role}: {text}"
                answers.append(RejectedError(self._role, line))
        return answers


def read_points(photo: Photo) -> list[Face] | None:
    """Faces of a points file or a column: five [x, y], ten numbers, or as in a points file."""
    fields, name = photo.item.fields, photo.item.name
    if (content := fields.get("points")) is not None:
        where = f"{name}, column points"
        if isinstance(content, list) and len(content) == 10:
            content = np.reshape(np.asarray(content, np.float64), (5, 2)).tolist()
        if isinstance(content, list):
            content = {"points": content}
    elif (text := fields.get("points.points.json")) is not None:
        where, content = f"{name}, its .points.json", _json(text)
    elif (text := fields.get("points.json")) is not None:
        where = f"{name}, its .json"
        try:
            content = _json(text)
        except ValueError:
            return None  # anybody's
        if not is_about_points(content):
            return None
    else:
        return None
    faces = parse_faces(content, where)
    check_inside(faces, photo.full[1], photo.full[0], where)
    return [scaled(face, photo.scale) for face in faces]


def scaled(face: Face, scale: Float[np.ndarray, "2"]) -> Face:
    """A face in a photo shrunk by ``scale``; coordinates name pixel centres."""
    points = ((face.points + 0.5) * scale - 0.5).astype(np.float32)
    box = ((face.box.reshape(2, 2) + 0.5) * scale - 0.5).astype(np.float32)
    return Face(points, box.reshape(4), face.score)


def read_mask(photo: Photo) -> Float[np.ndarray, "h w"] | None:
    """The head's mask of a grey picture of the stored photo's size."""
    content = photo.item.fields.get("mask") or photo.item.fields.get("mask.mask.png")
    if content is None:
        return None
    if not isinstance(content, bytes):
        raise RejectedError("mask", f"{photo.item.name}: its mask is no picture")
    assert photo.face is not None
    file = ImageBytes(content, f"the mask of {photo.item.name}")
    mask, _ = head_mask(photo.full, photo.face.points, mask_file=file)
    height, width = photo.image.shape[:2]
    if mask.shape == (height, width):
        return mask
    rows, columns = area_weights(mask.shape[0], height), area_weights(mask.shape[1], width)
    return np.clip(rows @ mask @ columns.T, 0.0, 1.0)


def read_caption(photo: Photo) -> str | None:
    """A caption on one line."""
    text = photo.item.fields.get("caption", photo.item.fields.get("caption.txt"))
    if text is None:
        return None
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise RejectedError(
                "caption", f"{photo.item.name}: its caption is not UTF-8 text"
            ) from None
    if not isinstance(text, str):
        raise RejectedError("caption", f"{photo.item.name}: its caption is no text")
    text = " ".join(text.split())
    if not text or len(text) > _MAX_CAPTION:
        raise RejectedError(
            "caption",
            f"{photo.item.name}: a caption has 1 to {_MAX_CAPTION} characters, not {len(text)}",
        )
    return text


def read_quality(photo: Photo) -> float | None:
    """A finite number."""
    value = photo.item.fields.get("quality", photo.item.fields.get("quality.quality.txt"))
    if value is None:
        return None
    number = float(value)
    if not np.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def read_embedding(photo: Photo) -> Float[np.ndarray, " d"] | None:
    """A vector: a list of numbers, or a .npy file of them."""
    value = photo.item.fields.get("embedding")
    if value is None and (content := photo.item.fields.get("embedding.embedding.npy")) is not None:
        value = np.load(io.BytesIO(content), allow_pickle=False)
    if value is None:
        return None
    vector = np.asarray(value, np.float32).reshape(-1)
    if not (1 < len(vector) <= _MAX_DIMENSIONS and np.isfinite(vector).all() and vector.any()):
        raise ValueError(f"it must be 2 to {_MAX_DIMENSIONS} finite numbers, not all 0")
    return vector


def _json(text: bytes) -> Any:
    if len(text) > _MAX_JSON:
        raise ValueError(f"it is too large: at most {_MAX_JSON} bytes")
    return json.loads(text)
