"""Records read back from pictures, as fields of a request."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from PIL import ExifTags

from fact_infer.service.operations import check_image
from fact_jax.face.images import MAX_PIXELS, open_image
from fact_jax.utils.errors import UserError

_SAME = (
    *("negative", "seed", "sampler", "steps", "height", "width", "guidance", "strength"),
    *("fill", "grow", "soften"),
)
_FACE = {
    "face": "face_guidance",
    "negative_face": "negative_face",
    "face_scale": "face_scale",
    "block_scales": "block_scale",
    "start": "face_start",
    "stop": "face_stop",
    "cap": "face_cap",
    "adain": "adain",
    "combine": "combine",
}
_MAX_RECORD = 1 << 20


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """What a picture that was made here says of itself; UserError for any other file."""
    check_image(Path(path), MAX_PIXELS, Path(path).name, ("PNG", "JPEG"))
    with open_image(path) as image:
        text = image.info.get("fact_jax")
        if text is None and image.format == "JPEG":
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
            text = _of_comment(comment)
    try:
        record = json.loads(text) if isinstance(text, str) and len(text) < _MAX_RECORD else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or "prompt" not in record:
        raise UserError("this picture holds no record: it was made elsewhere, or edited since")
    return record


def _of_comment(comment: Any) -> str | None:
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return None
    try:
        texts = json.loads(comment[8:].decode("utf-16-be"))
    except (ValueError, RecursionError):
        return None
    return texts.get("fact_jax") if isinstance(texts, dict) else None


def fields_of_record(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of a request that make the picture again, but for its photos and pictures."""
    found = {name: record[name] for name in _SAME if record.get(name) is not None}
    found["prompt"] = [str(record["prompt"])]
    if record.get("control scale") is not None:
        found["control_scale"] = record["control scale"]
    face = record.get("face")
    for name, field in _FACE.items():
        if isinstance(face, dict) and face.get(name) is not None:
            found[field] = face[name]
    if isinstance(found.get("block_scale"), list):
        with contextlib.suppress(TypeError, ValueError):  # whoever reads the fields refuses it
            found["block_scale"] = dict(found["block_scale"])
    return found
