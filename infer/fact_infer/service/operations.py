"""What can be asked for: fields of a request become work, within the operator's limits."""

import argparse
import base64
import dataclasses
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fact_infer.parts import Parts
from fact_infer.service.engine import Engine
from fact_infer.service.fields import POINTS, Field, read_fields
from fact_infer.service.jobs import Job
from fact_infer.service.work import GenerateWork, RedrawWork, Work
from fact_jax.face import (
    Face,
    PreparedFace,
    draw_face,
    find_faces,
    prepare_photo,
    read_image,
)
from fact_jax.face.landmarks import local_pack
from fact_jax.utils.errors import UserError

Say = Callable[[str], None]
# Repetitions in a stranger's regular expression could run for years.
_PATTERN = re.compile(r"[\w.|^$]{1,100}")
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

    @property
    def can_find_faces(self) -> bool:
        """Whether there is a face detector."""
        return local_pack(self.operator.detector) is not None

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

    def check_photo(self, job: Job, content: bytes) -> None:
        """UserError for what is no photo."""
        check_image(job.receive("photo", content), self.engine.limits.input_pixels)

    def receive(self, job: Job, values: dict[str, Any], fields: list[Field]) -> dict[str, Any]:
        """The values with each file's content kept in a file of the job."""

        def keep(name: str, content: bytes) -> Path:
            path = job.receive(name, content)
            if name not in POINTS:
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
        beside = values.pop("template_points", [])
        if beside and len(beside) != len(values["templates"]):
            raise UserError("give template_points once for each template, in their order")
        for template, points in zip(values.get("templates", ()), beside, strict=False):
            # Two templates may have the same points, which are one file.
            template.with_suffix(".points.json").write_bytes(points.read_bytes())
        return values

    def check_points(self, values: dict[str, Any]) -> None:
        """UserError for photos in which nobody could find a face."""
        unmarked = values.get("photo") and not values.get("points")
        if unmarked and not self.can_find_faces:
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
        for pattern, _ in values["block_scale"]:
            if not _PATTERN.fullmatch(pattern):
                raise UserError(
                    f"block_scale {pattern[:40]!r}: here a pattern has letters, digits, _ . | ^ $"
                )

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
        """The faces of a photo ready for JSON, for each the crop that the encoder sees."""
        image, found = self.find_faces(job, given)
        faces = [
            {
                "points": np.round(face.points.astype(float), 2).tolist(),
                "box": np.round(face.box.astype(float), 2).tolist(),
                "score": round(float(face.score), 4),
                "crop": base64.b64encode(png(prepared.crop)).decode(),
                "seen": base64.b64encode(png(_seen(prepared))).decode(),
            }
            for face, prepared in found
        ]
        size = {"height": image.shape[0], "width": image.shape[1]}
        return {**size, "faces": faces, "notes": job.notes}

    def find_faces(
        self, job: Job, given: dict[str, Any]
    ) -> tuple[np.ndarray, list[tuple[Face, PreparedFace]]]:
        """A photo, and its faces from left to right."""
        fields = self.operations["faces"].fields
        values = self.receive(job, read_fields(fields, given), fields)
        self.check_points(values)
        photo, points, pack = values["photo"], values["points"], self.operator.detector
        image = read_image(photo)
        found, note = find_faces(photo, image, points_file=points, pack=pack)
        if note:
            job.say(note)
        if len(found) > self.engine.limits.pictures:
            raise UserError(f"at most {self.engine.limits.pictures} faces here, got {len(found)}")
        size = self.parts.face.encoder_config.img_size if self.parts.face else 112
        prepared = [
            prepare_photo(
                photo,
                points_file=points,
                mask_file=values["mask"],
                parsing=values["parsing"],
                pack=pack,
                index=index,
                crop_size=size,
            )
            for index in range(len(found))
        ]
        return image, list(zip(found, prepared, strict=True))


def _seen(face: PreparedFace) -> np.ndarray:
    return draw_face(face.image, face.points, face.mask)


def png(pixels: np.ndarray) -> bytes:
    """A picture's pixels as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def check_image(
    path: Path, limit: int, name: str | None = None, formats: tuple[str, ...] = ()
) -> None:
    """UserError for what is not a picture of these formats, or has more than ``limit`` pixels.

    ``name`` is what messages call it, ``formats`` are usual ones unless given. Nothing is decoded.
    Of Pillow's readers some start other programs: those are not asked.
    """
    name, formats = name or path.name.partition("-")[0], formats or _formats()
    try:
        with Image.open(path, formats=formats) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise UserError(f"{name} is too large: at most {limit:,} pixels") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, RuntimeError):
        raise UserError(
            f"{name} is not a picture that can be read ({', '.join(formats)})"
        ) from None
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
