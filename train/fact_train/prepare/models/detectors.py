"""Face detectors in ONNX files: SCRFD and insightface's RetinaFace, YuNet, RetinaFace of PyTorch.

Which it is follows from the outputs. All give boxes, a score and five points.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from fact_jax.face import Face
from fact_jax.utils.errors import UserError
from fact_train.prepare.models.onnx_models import OnnxModel, normalized
from fact_train.prepare.models.provider import Photo
from fact_train.prepare.models.side_files import scaled

_SIDE, _OVERLAP, _MOST = 640, 0.4, 100
_STRIDES = (8, 16, 32, 64, 128)
_PRIORS = ((8, (16, 32)), (16, (64, 128)), (32, (256, 512)))
_BGR_MEAN = (104.0, 117.0, 123.0)


class _Found(NamedTuple):
    """Candidates in pixels of the network's input."""

    scores: Float[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    points: Float[np.ndarray, "n 10"]


class OnnxDetector:
    """Faces with a score of at least ``threshold``, in pixels of the photo's ``image``."""

    def __init__(self, path: Path, provider: str, threshold: float):
        self.name, self._threshold = path.name, threshold
        self._model = OnnxModel(path, provider)
        self._mean: Any
        names = [name for name, _ in self._model.outputs]
        widths = [shape[-1] if shape else None for _, shape in self._model.outputs]
        if {"cls_8", "obj_8", "bbox_8", "kps_8"} <= set(names):
            self._decode, self._mean, self._std, self._bgr = _yunet(names), 0.0, 1.0, True
        elif len(names) in (9, 15) and widths[0] == 1 and widths[-1] == 10:
            self._decode, self._mean, self._std, self._bgr = _scrfd, 127.5, 128.0, False
        elif sorted(filter(None, widths)) == [2, 4, 10]:
            order = [widths.index(width) for width in (4, 2, 10)]
            self._decode, self._bgr = _retinaface(order), True
            self._mean, self._std = _BGR_MEAN, 1.0
        else:
            raise UserError(
                f"{path} has {len(names)} outputs of widths {widths}: known detectors are SCRFD, "
                "RetinaFace and YuNet, with five points"
            )
        self._rows = self._model.batched and len(self._model.outputs[0][1]) == 3

    def __call__(self, photos: Sequence[Photo]) -> list[list[Face]]:
        height, width = self._model.size(_SIDE)
        scales, inputs = [], []
        for photo in photos:
            picture, scale = _letterbox(photo.image, height, width)
            inputs.append(picture[..., ::-1] if self._bgr else picture)
            scales.append(scale)
        images = normalized(inputs, self._mean, self._std)
        if self._rows:
            whole = self._model.run(images)
            outputs = [[one[i] for one in whole] for i in range(len(photos))]
        else:
            rows = self._model.run(images, one_by_one=True)
            outputs = [[np.asarray(one).reshape(-1, one.shape[-1]) for one in row] for row in rows]
        return [
            self._faces(self._decode(output, (height, width)), scale)
            for output, scale in zip(outputs, scales, strict=True)
        ]

    def _faces(self, found: _Found, scale: Float[np.ndarray, "2"]) -> list[Face]:
        sure = np.flatnonzero(found.scores >= self._threshold)
        order = sure[np.argsort(-found.scores[sure], kind="stable")]
        kept: list[int] = []
        for i in order:
            overlaps = (_overlap(found.boxes[i], found.boxes[j]) > _OVERLAP for j in kept)
            if len(kept) < _MOST and not any(overlaps):
                kept.append(int(i))
        faces = []
        for i in kept:
            points = np.asarray(found.points[i], np.float32).reshape(5, 2)
            face = Face(points, np.asarray(found.boxes[i], np.float32), float(found.scores[i]))
            faces.append(scaled(face, 1 / scale))
        return faces


def _letterbox(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> tuple[UInt8[np.ndarray, "height width 3"], Float[np.ndarray, "2"]]:
    """The picture in the top left corner, as large as it fits, and its scale in x and y."""
    ratio = min(height / image.shape[0], width / image.shape[1])
    new = max(1, round(image.shape[1] * ratio)), max(1, round(image.shape[0] * ratio))
    whole = np.zeros((height, width, 3), np.uint8)
    whole[: new[1], : new[0]] = np.asarray(Image.fromarray(image).resize(new, Image.BILINEAR))
    return whole, np.array([new[0] / image.shape[1], new[1] / image.shape[0]])


def _centres(size: tuple[int, int], stride: int, anchors: int) -> Float[np.ndarray, "n 2"]:
    rows, columns = np.mgrid[: -(-size[0] // stride), : -(-size[1] // stride)]
    cells = np.stack([columns, rows], -1).reshape(-1, 2).astype(np.float32) * stride
    return np.repeat(cells, anchors, 0)


def _scrfd(outputs: list[Any], size: tuple[int, int]) -> _Found:
    """Scores, distances to the box's sides and to the points, in strides, from cells' corners."""
    levels = len(outputs) // 3
    found = []
    for level, stride in enumerate(_STRIDES[:levels]):
        scores, sides, points = (outputs[level + levels * part] for part in range(3))
        anchors = 2 if levels == 3 else 1
        at = _centres(size, stride, anchors)
        boxes = np.concatenate([at - sides[:, :2] * stride, at + sides[:, 2:] * stride], 1)
        found.append((scores[:, 0], boxes, np.tile(at, 5) + points * stride))
    return _Found(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _yunet(names: list[str]) -> Any:
    """YuNet of OpenCV's zoo: centre and logarithm of the size; the score is a geometric mean."""

    def decode(outputs: list[Any], size: tuple[int, int]) -> _Found:
        by_name, found = dict(zip(names, outputs, strict=True)), []
        for stride in _STRIDES[:3]:
            cls, obj, box, points = (
                by_name[f"{kind}_{stride}"] for kind in ("cls", "obj", "bbox", "kps")
            )
            at = _centres(size, stride, 1)
            scores = np.sqrt(np.clip(cls[:, 0], 0, 1) * np.clip(obj[:, 0], 0, 1))
            middle, half = at + box[:, :2] * stride, np.exp(box[:, 2:]) * stride / 2
            boxes = np.concatenate([middle - half, middle + half], 1)
            found.append((scores, boxes, np.tile(at, 5) + points * stride))
        return _Found(*(np.concatenate(part) for part in zip(*found, strict=True)))

    return decode


def _retinaface(order: list[int]) -> Any:
    """RetinaFace of PyTorch: offsets from priors, with variances 0.1 and 0.2."""

    def decode(outputs: list[Any], size: tuple[int, int]) -> _Found:
        offsets, classes, landmarks = (outputs[i] for i in order)
        priors = []
        sides: tuple[int, ...]
        for stride, sides in _PRIORS:
            centres = _centres(size, stride, len(sides)) + stride / 2
            lengths = np.tile(np.asarray(sides, np.float32), len(centres) // len(sides))
            priors.append(np.concatenate([centres, lengths[:, None], lengths[:, None]], 1))
        prior = np.concatenate(priors)
        middle = prior[:, :2] + offsets[:, :2] * 0.1 * prior[:, 2:]
        half = prior[:, 2:] * np.exp(offsets[:, 2:] * 0.2) / 2
        points = np.tile(prior[:, :2], 5) + landmarks * 0.1 * np.tile(prior[:, 2:], 5)
        return _Found(classes[:, 1], np.concatenate([middle - half, middle + half], 1), points)

    return decode


def _overlap(one: Float[np.ndarray, "4"], other: Float[np.ndarray, "4"]) -> float:
    """Intersection over union of two boxes."""
    low, high = np.maximum(one[:2], other[:2]), np.minimum(one[2:], other[2:])
    inside = float(np.prod(np.maximum(high - low, 0)))
    areas = [float(np.prod(np.maximum(box[2:] - box[:2], 0))) for box in (one, other)]
    return inside / max(sum(areas) - inside, 1e-9)
