"""A chunk of a source to finished records and lines about its photos, in two files."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from fact_jax.portraits import GENERIC_CAPTION
from fact_train.data.dataset_files import Coder, face_features, shard_writer
from fact_train.data.record_writer import as_row
from fact_train.prepare.models.provider import Photo, query_providers
from fact_train.prepare.models.roles import providers
from fact_train.prepare.photos import measures
from fact_train.prepare.photos.photo import check_gates, choose_face, decode, finish
from fact_train.prepare.settings import BuildSettings, RejectedError
from fact_train.prepare.sources import Item, batched, read_chunk
from fact_train.prepare.store import Store, json_line

THUMBNAIL = 96
_THUMBNAILS = 2
"""Of each reason in a chunk: for the report, which shows a few."""


def prepare_chunk(settings_json: str, work: str, name: str) -> dict[str, int]:
    """Chunk ``name`` of the folder ``work``: ``done/NAME.jsonl`` and ``.array_record`` beside it.

    Gives how many photos there are and how many are rejected. What is there already is kept.
    """
    store, settings = Store(work), BuildSettings.from_json(settings_json)
    lines_name = f"done/{name}.jsonl"
    if store.exists(lines_name):
        return _count(list(store.lines(lines_name)))
    chunk = store.json(f"list/{name}.json")
    coder = Coder(face_features(None if settings.buckets else settings.size, settings.crop))
    lines: list[dict] = []
    shown: Counter[str] = Counter()
    with store.writing(f"done/{name}.array_record") as temporary:
        writer, written = shard_writer(temporary), 0
        for items in batched(read_chunk(settings, chunk), settings.batch):
            for photo in _batch(items, settings_json, settings):
                if photo.rejected is not None:
                    lines.append(_rejected(photo, shown))
                    continue
                example, about = finish(photo, settings)
                encoded = coder.encode(as_row(example))
                writer.write(encoded)
                about |= {"name": example.name, "row": written, "bytes": len(encoded)}
                lines.append(about | _keys(photo, example.identity))
                written += 1
        writer.close()
    # Last: a chunk is done where its lines are there.
    store.write(lines_name, "".join(map(json_line, lines)))
    return _count(lines)


def _count(lines: list[dict]) -> dict[str, int]:
    return {"in": len(lines), "rejected": sum("reason" in line for line in lines)}


def _batch(items: list[Item], settings_json: str, settings: BuildSettings) -> Iterator[Photo]:
    """Photos in the order of the items, ready to be written or rejected."""
    photos: list[Photo] = []
    for item in items:
        try:
            photos.append(decode(item, settings))
        except RejectedError as error:
            nothing = np.zeros((1, 1, 3), np.uint8)
            photos.append(Photo(item, nothing, (1, 1), rejected=error))
    roles = providers(settings_json)
    alive = [photo for photo in photos if photo.rejected is None]
    for photo, faces in zip(alive, query_providers("points", roles["points"], alive), strict=True):
        _try(photo, lambda photo=photo, faces=faces: choose_face(photo, faces, settings.gates))
    for role, keep in _KEEP.items():
        alive = [photo for photo in photos if photo.rejected is None]
        for photo, answer in zip(alive, query_providers(role, roles[role], alive), strict=True):
            _try(photo, lambda keep=keep, photo=photo, answer=answer: keep(photo, answer, settings))
    yield from photos


def _try(photo: Photo, step: Any) -> None:
    try:
        if photo.rejected is None:
            step()
    except RejectedError as error:
        photo.rejected = error


def _keep_quality(photo: Photo, answer: float | None, settings: BuildSettings) -> None:
    photo.quality = answer
    if answer is None and settings.gates.quality is not None:
        raise RejectedError(
            "gate quality",
            f"{photo.item.name}: nothing tells its quality: name a model by --quality, or lay a "
            ".quality.txt beside it",
        )
    if answer is not None:
        photo.about["quality"] = answer
        check_gates(photo.item.name, {"quality": answer}, settings.gates)


def _keep_mask(photo: Photo, answer: Any, settings: BuildSettings) -> None:
    if answer is not None and not answer.any():
        raise RejectedError("mask", f"{photo.item.name}: no head in its mask")
    photo.mask = answer


def _keep_embedding(photo: Photo, answer: Any, settings: BuildSettings) -> None:
    photo.embedding = None if answer is None else measures.quantized(answer)


def _keep_caption(photo: Photo, answer: str | None, settings: BuildSettings) -> None:
    photo.caption = answer or GENERIC_CAPTION
    photo.by.setdefault("caption", "neutral")


_KEEP = {
    "quality": _keep_quality,
    "mask": _keep_mask,
    "embedding": _keep_embedding,
    "caption": _keep_caption,
}
"""In this order: what a gate rejects needs no mask."""


def _keys(photo: Photo, identity: str) -> dict[str, Any]:
    """What decides about a record among all others."""
    assert photo.face is not None
    view = measures.picture_view(photo.image, photo.face.points)
    bits = np.packbits(measures.view_hash(view))
    keys = {
        "identity": identity,
        "hash": base64.b85encode(bits.tobytes()).decode(),
        "colours": base64.b85encode(measures.view_colours(view).tobytes()).decode(),
        "sha256": hashlib.sha256(photo.item.photo).hexdigest(),
    }
    if photo.embedding is not None:
        keys["embedding"] = base64.b85encode(photo.embedding.tobytes()).decode()
    return keys


def _rejected(photo: Photo, shown: Counter) -> dict[str, Any]:
    error = photo.rejected
    assert error is not None
    line: dict[str, Any] = {
        "name": photo.item.name,
        "reason": error.reason,
        "detail": str(error)[:1000],
        **{key: str(photo.item.fields[key]) for key in ("identity",) if key in photo.item.fields},
        **{key: round(value, 4) for key, value in photo.about.items()},
    }
    if min(photo.full) > 1 and shown[error.reason] < _THUMBNAILS:
        shown[error.reason] += 1
        line["thumbnail"] = thumbnail(photo.image)
    return line


def thumbnail(image: np.ndarray) -> str:
    """A small JPEG, in base64."""
    small, buffer = Image.fromarray(image), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
