"""The interface of detectors, parsers, quality, embedders and captioners."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Float, Int8, UInt8

from fact_jax.face import Face
from fact_jax.utils.errors import UserError
from fact_train.prepare.settings import RejectedError
from fact_train.prepare.sources import Item


@dataclasses.dataclass
class Photo:
    """A decoded photo on its way; ``image`` is shrunk, points and masks are in its pixels."""

    item: Item
    image: UInt8[np.ndarray, "h w 3"]
    full: tuple[int, int]
    """Height and width as stored, upright."""
    faces: list[Face] = dataclasses.field(default_factory=list)
    face: Face | None = None
    aligned: UInt8[np.ndarray, "112 112 3"] | None = None
    mask: Float[np.ndarray, "h w"] | None = None
    caption: str = ""
    quality: float | None = None
    embedding: Int8[np.ndarray, " d"] | None = None
    by: dict[str, str] = dataclasses.field(default_factory=dict)
    """Role -> which provider answered."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    rejected: RejectedError | None = None

    @property
    def scale(self) -> Float[np.ndarray, "2"]:
        """Pixels of ``image`` for each of the stored photo, in x and y."""
        return np.array([self.image.shape[1] / self.full[1], self.image.shape[0] / self.full[0]])


T = TypeVar("T", covariant=True)


class Provider(Protocol[T]):
    """Answers each of some photos: a value, None, or why the photo is rejected."""

    name: str

    def __call__(self, photos: Sequence[Photo]) -> Sequence["T | RejectedError | None"]: ...


Detector = Provider[list[Face]]
"""Faces in pixels of ``image``."""
Parser = Provider[Float[np.ndarray, "h w"]]
"""The head's mask in [0, 1], of the size of ``image``."""
Quality = Provider[float]
Embedder = Provider[Float[np.ndarray, " d"]]
Captioner = Provider[str]


def query_providers(role: str, providers: Sequence[Provider], photos: Sequence[Photo]) -> list[Any]:
    """The first answer to each photo, in order; what is rejected is marked so in the photo."""
    answers: list[Any] = [None] * len(photos)
    for provider in providers:
        open_ = [i for i, one in enumerate(answers) if one is None and not photos[i].rejected]
        if not open_:
            break
        found = provider([photos[i] for i in open_])
        for i, answer in zip(open_, found, strict=True):
            if isinstance(answer, RejectedError):
                photos[i].rejected = answer
            elif answer is not None:
                answers[i], photos[i].by[role] = answer, provider.name
    return answers


def describe_model(path: Path) -> dict[str, Any]:
    """Name, hash and licence of a model's file or folder, for the data set's card."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in (one for one in files if one.is_file()):
        if path.is_dir():
            digest.update(f"{file.relative_to(path)}\n".encode())
        with open(file, "rb") as opened:
            while block := opened.read(1 << 20):
                digest.update(block)
    folder = path if path.is_dir() else path.parent
    return {"file": path.name, "sha256": digest.hexdigest(), "licence": _licence(folder)}


def _licence(folder: Path) -> str | None:
    """What a model card says (``license:`` of its head), else a licence file's first line."""
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text("utf-8", errors="replace")[:10_000]
        found = re.search(r"\A---\n.*?^licen[sc]e:\s*(\S+).*?^---$", head, re.M | re.S)
        if found:
            return found[1]
    for path in sorted(folder.glob("*")):
        if path.is_file() and re.search(r"licen[sc]e", path.name, re.I):
            lines = path.read_text("utf-8", errors="replace")[:10_000].split("\n")
            return next((line.strip()[:200] for line in lines if line.strip()), path.name)
    return None


def model_path(text: str, role: str) -> Path:
    """A model's file: the one named, or the only .onnx of a folder."""
    path = Path(text).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.onnx"))
        if len(found) != 1:
            raise UserError(f"--{role} {path} holds {len(found)} .onnx files: name the one to use")
        path = found[0]
    if not path.is_file():
        raise UserError(f"--{role} {path} does not exist")
    return path
