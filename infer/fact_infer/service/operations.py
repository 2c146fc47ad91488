"""What can be asked for: fields of a request become work, within the operator's limits."""

import argparse
import base64
import dataclasses
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fact_infer.parts import Parts
from fact_infer.service.engine import Engine
from fact_infer.service.fields import Field, read_fields
from fact_infer.service.jobs import Job
from fact_infer.service.work import GenerateWork, RedrawWork, Work
from fact_jax.face import draw_face, find_faces, prepare_photo, read_image
from fact_jax.face.landmarks import local_pack
from fact_jax.utils.errors import UserError

Say = Callable[[str], None]
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF", "HEIF")


class Operation(NamedTuple):
    """What is drawn at one address: its fields, and how they become work.

    ``plan`` takes what argparse would give, the parts, and where notes and warnings go.
    """

    kind: str
    summary: str
    fields: list[Field]
    plan: Callable[[argparse.Namespace, Parts, Say, Say], Work]


class Service:
    """The engine with its operations; ``operator`` is what was said when it was started."""

    def __init__(
        self,
        engine: Engine,
        parts: Parts,
        operations: list[Operation],
        operator: argparse.Namespace,
        check_safety: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.engine, self.parts, self.operator = engine, parts, operator
        self.operations = {operation.kind: operation for operation in operations}
        self._check_safety = check_safety

    def plan(self, kind: str, job: Job, given: dict[str, Any]) -> Work:
        """The work that a request's fields ask for; UserError if it cannot be done."""
        operation = self.operations[kind]
        values = self.receive(job, read_fields(operation.fields, given), operation.fields)
        self._check_numbers(values)
        self.check_points(values)
        arguments = argparse.Namespace(**(vars(self.operator) | values))
        work = operation.plan(arguments, self.parts, job.say, job.say)
        self._check_pictures(work)
        return work

    def receive(self, job: Job, values: dict[str, Any], fields: list[Field]) -> dict[str, Any]:
        """The values with each file's content kept in a file of the job."""

        def keep(name: str, content: bytes) -> Path:
            path = job.receive(name, content)
            if name != "points":
                check_image(path, self.engine.limits.input_pixels)
            return path

        for field in fields:
            value = values[field.name]
            if field.kind == "file" and value is not None:
                values[field.name] = (
                    [keep(field.name, content) for content in value]
                    if field.many
                    else keep(field.name, value)
                )
        return values

    def check_points(self, values: dict[str, Any]) -> None:
        """UserError for photos in which nobody could find a face."""
        unmarked = values.get("photo") and not values.get("points")
        if unmarked and local_pack(self.operator.detector) is None:
            raise UserError(
                "photos need points here, as there is no face detector: five [x, y] of each: "
                "left eye, right eye, nose tip, left and right mouth corner, as seen"
            )

    def _check_numbers(self, values: dict[str, Any]) -> None:
        limits = self.engine.limits
        asked = len(values.get("templates") or values["prompt"]) * max(values.get("count", 1), 0)
        for name, value, most in (
            ("steps", values["steps"], limits.steps),
            ("pictures", asked, limits.pictures),
            ("height", values.get("height") or 0, limits.pixels),
            ("width", values.get("width") or 0, limits.pixels),
        ):
            if value > most:
                raise UserError(f"{name}: at most {most:,} here, got {value:,}")

    def _check_pictures(self, work: Work) -> None:
        limits, base = self.engine.limits, self.parts.base
        if isinstance(work, GenerateWork):
            count = len(work.request.pictures())
            height, width = base.picture_size(work.request)
        else:
            assert isinstance(work, RedrawWork)  # there is no other
            count = sum(len(request.targets) for request in work.requests)
            height, width = base.picture_size(work.params)
        if count > limits.pictures:
            raise UserError(f"at most {limits.pictures} pictures or faces here, got {count}")
        if count * height * width > limits.pixels:
            raise UserError(
                f"at most {limits.pixels:,} pixels here, got {count} x {width} x {height}"
            )

    def submit(self, kind: str, job: Job, given: dict[str, Any]) -> None:
        """Plan a job and queue it. Its place is free again if that fails."""
        try:
            work = self.plan(kind, job, given)
            if self._check_safety is not None:
                work = dataclasses.replace(work, check_safety=self._check_safety)
            self.engine.enqueue(job, work)
        except UserError as error:
            line = job.plain(str(error))
            self.engine.drop(job)
            raise UserError(line) from None
        except BaseException:
            self.engine.drop(job)
            raise

    def faces(self, job: Job, given: dict[str, Any]) -> dict[str, Any]:
        """What is found in a photo: points, boxes, and for each the crop that the encoder sees."""
        fields = self.operations["faces"].fields
        values = self.receive(job, read_fields(fields, given), fields)
        self.check_points(values)
        photo, points = values["photo"], values["points"]
        image = read_image(photo)
        found, note = find_faces(photo, image, points_file=points, pack=self.operator.detector)
        if note:
            job.say(note)
        size = self.parts.face.encoder_config.img_size if self.parts.face else 112
        faces = []
        for index, face in enumerate(found):
            prepared = prepare_photo(
                photo,
                points_file=points,
                mask_file=values["mask"],
                parsing=values["parsing"],
                pack=self.operator.detector,
                index=index,
                crop_size=size,
            )
            seen = draw_face(prepared.image, prepared.points, prepared.mask)
            faces.append(
                {
                    "points": np.round(face.points.astype(float), 2).tolist(),
                    "box": np.round(face.box.astype(float), 2).tolist(),
                    "score": round(float(face.score), 4),
                    "crop": base64.b64encode(png(prepared.crop)).decode(),
                    "seen": base64.b64encode(png(seen)).decode(),
                }
            )
        size_of = {"height": image.shape[0], "width": image.shape[1]}
        return {**size_of, "faces": faces, "notes": job.notes}


def png(pixels: np.ndarray) -> bytes:
    """A picture's pixels as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def check_image(path: Path, limit: int) -> None:
    """UserError for what is not a picture of a usual format, or has more than ``limit`` pixels.

    Nothing is decoded. Of Pillow's readers some start other programs: those are not asked.
    """
    name = path.name.partition("-")[0]
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width, height = limit, 2
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError):
        formats = ", ".join(_formats())
        raise UserError(f"{name} is not a picture that can be read ({formats})") from None
    if width * height > limit:
        raise UserError(f"{name} is too large: {width} x {height}, at most {limit:,} pixels")


@functools.cache
def _formats() -> tuple[str, ...]:
    try:
        import pillow_heif

        pillow_heif.register_heif_opener()
    except ImportError:
        pass
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
