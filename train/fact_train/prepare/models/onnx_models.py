"""Parsers, quality and embedding networks in ONNX files of the public layouts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image

from fact_jax.face.align import ARCFACE_TEMPLATE, invert_affine, similarity_transform
from fact_jax.face.images import one_line, takes_raw_pixels
from fact_jax.face.mask import HEAD_LABELS
from fact_jax.utils.errors import UserError
from fact_train.prepare.models.provider import Photo

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEAD_SQUARE = 256.0
"""Side of what a parser sees, in units of ArcFace's template (112 is the aligned crop)."""


class OnnxModel:
    """A network with one input of (n, 3, h, w), in onnxruntime on one thread.

    One thread, so that its sums do not depend on the machine's cores; processes are what is many.
    """

    def __init__(self, path: Path, provider: str):
        try:
            import onnxruntime
        except ImportError as error:
            raise UserError(
                f"{path} needs onnxruntime ({one_line(error)}): pip install 'fact-jax[faces]'"
            ) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        wanted = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[provider]
        if wanted not in onnxruntime.get_available_providers():
            raise UserError(f"this onnxruntime has no {wanted}: pip install onnxruntime-gpu")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
        except Exception as error:  # onnxruntime's errors share no base class
            raise UserError(f"{path} is no ONNX model that loads: {one_line(error)}") from None
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3:
            raise UserError(f"{path} must have one input of n x 3 x h x w, not {shape}")
        self.path, self._input = path, inputs[0].name
        self.outputs = [(one.name, one.shape) for one in outputs]
        self.batched = not isinstance(shape[0], int) and all(
            one.shape and not isinstance(one.shape[0], int) for one in outputs
        )
        self._size = shape[2:]

    def size(self, default: int) -> tuple[int, int]:
        """Height and width of the input, ``default`` where any will do."""
        height, width = (side if isinstance(side, int) else default for side in self._size)
        return height, width

    def run(self, images: Float32[np.ndarray, "n 3 h w"], one_by_one: bool = False) -> list[Any]:
        """The outputs, each with a row for each image."""
        try:
            if self.batched and not one_by_one:
                return self._session.run(None, {self._input: images})
            rows = [self._session.run(None, {self._input: one[None]}) for one in images]
        except Exception as error:
            raise UserError(f"{self.path} failed: {one_line(error)}") from None
        if one_by_one:
            return rows
        return [np.concatenate(some) for some in zip(*rows, strict=True)]


def normalized(
    images: Sequence[UInt8[np.ndarray, "h w 3"]], mean: Any, std: Any
) -> Float32[np.ndarray, "n 3 h w"]:
    """(x - mean) / std of pixels in 0..255, channels first."""
    stacked = (np.stack(images).astype(np.float32) - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))


class _OfCrops:
    """A network that looks at the aligned crop: RGB, 127.5 away from 0 and divided by 127.5."""

    def __init__(self, path: Path, provider: str):
        self.name = path.name
        self._model = OnnxModel(path, provider)
        height, width = self._model.size(112)
        if height != width:
            raise UserError(f"{path} takes {height} x {width}: aligned crops are square")
        self._side = height
        self._raw = _normalizes_itself(path)

    def _run(self, photos: Sequence[Photo]) -> list[Any]:
        crops = [photo.aligned for photo in photos if photo.aligned is not None]
        if self._side != 112:
            size = (self._side, self._side)
            crops = [np.asarray(Image.fromarray(c).resize(size, Image.BICUBIC)) for c in crops]
        mean, std = (0.0, 1.0) if self._raw else (127.5, 127.5)
        return self._model.run(normalized(crops, mean, std))


class OnnxEmbedder(_OfCrops):
    """Recognition networks in ArcFace's layout: 112 x 112 to (n, d)."""

    def __call__(self, photos: Sequence[Photo]) -> list[Float[np.ndarray, " d"]]:
        return list(np.asarray(self._run(photos)[0], np.float32).reshape(len(photos), -1))


class OnnxQuality(_OfCrops):
    """eDifFIQA and CR-FIQA: the output with one number an image is the quality."""

    def __call__(self, photos: Sequence[Photo]) -> list[float]:
        for output in self._run(photos):
            if output.size == len(photos):
                return [float(value) for value in np.asarray(output).reshape(-1)]
        raise UserError(f"{self.name} gives no single number for an image: it is no quality model")


class OnnxParser:
    """BiSeNet for face parsing: an upright square around the head to 19 labels of CelebAMask-HQ."""

    def __init__(self, path: Path, provider: str):
        self.name = path.name
        self._model = OnnxModel(path, provider)
        self._height, self._width = self._model.size(512)

    def __call__(self, photos: Sequence[Photo]) -> list[Float[np.ndarray, "h w"]]:
        boxes = [head_square(photo) for photo in photos]
        size = (self._width, self._height)
        pictures = [
            Image.fromarray(photo.image).crop(box).resize(size, Image.BILINEAR)
            for photo, box in zip(photos, boxes, strict=True)
        ]
        mean, std = (np.multiply(255.0, part) for part in (_IMAGENET_MEAN, _IMAGENET_STD))
        scores = self._model.run(normalized([np.asarray(p) for p in pictures], mean, std))[0]
        if scores.ndim != 4 or scores.shape[1] <= max(HEAD_LABELS):
            raise UserError(f"{self.name} gives {scores.shape}: a parser gives n x 19 x h x w")
        heads = np.isin(scores.argmax(1), list(HEAD_LABELS)).astype(np.float32)
        return [
            _paste(head, photo.image.shape[:2], box)
            for head, photo, box in zip(heads, photos, boxes, strict=True)
        ]


def head_square(photo: Photo) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) of an upright square around the head, in pixels."""
    assert photo.face is not None
    to_photo = invert_affine(similarity_transform(photo.face.points, ARCFACE_TEMPLATE))
    scale = float(np.hypot(to_photo[0, 0], to_photo[1, 0]))
    x, y = to_photo[:, :2] @ (56.0, 56.0) + to_photo[:, 2]
    half = _HEAD_SQUARE * scale / 2
    left, top, side = round(x - half), round(y - half), max(1, round(2 * half))
    return left, top, left + side, top + side


def _paste(
    head: Float32[np.ndarray, "h w"], shape: tuple[int, ...], box: tuple[int, int, int, int]
) -> Float32[np.ndarray, "height width"]:
    """A mask of a box, brought to its size and laid into an empty one of the photo."""
    side = (box[2] - box[0], box[3] - box[1])
    inside = Image.fromarray(head).resize(side, Image.BILINEAR)
    whole = Image.new("F", (shape[1], shape[0]))
    whole.paste(inside, box[:2])
    return np.clip(np.asarray(whole), 0.0, 1.0)


def _normalizes_itself(path: Path) -> bool:
    """Whether a network begins with what others do outside, as those of MXNet."""
    import onnx

    nodes = onnx.load(str(path), load_external_data=False).graph.node[:8]
    return takes_raw_pixels([node.name for node in nodes])
