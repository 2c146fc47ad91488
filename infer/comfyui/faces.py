"""A face in a picture: five points, the head's mask, the aligned crop. NumPy and Pillow only."""

import glob
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

ORDER = "left eye, right eye, nose tip, left and right mouth corner, as the viewer sees them"
BLACK = "the head's mask is black: LoadImage gives that for a photo without alpha"
LONGEST_SIDE = 1000
# ArcFace's template of a crop of 112, and the ellipse of a head in it.
_SIZE = 112
_TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
_CENTRE, _HALF_AXES = np.array([56.0, 51.0]), np.array([58.0, 74.0])
_MAX_TEXT = 1 << 20


def read_points(text: str, photos: int) -> list[np.ndarray] | None:
    """Five points (5, 2) for each photo from JSON; None where there is no text.

    ``[[x, y], ...]`` or ``{"points": [[x, y], ...]}`` for one photo, a list of such for several.
    """
    if not text.strip():
        return None
    try:
        content = json.loads(text[:_MAX_TEXT])
        one = isinstance(content, dict) or (len(content) == 5 and np.ndim(content) == 2)
        entries = [content] if one else content
        points = [np.array(e["points"] if isinstance(e, dict) else e, float) for e in entries]
    except (KeyError, TypeError, ValueError, RecursionError):
        points = []
    if not points or any(p.shape != (5, 2) or not np.isfinite(p).all() for p in points):
        raise ValueError(f"points must be JSON as [[x, y], ...] with five points: {ORDER}")
    if len(points) != photos:
        raise ValueError(f"{len(points)} faces' points for {photos} photos: give one for each")
    for p in points:
        across, down = p[1] - p[0], p[3:].mean(0) - p[:2].mean(0)
        if across[0] * down[1] - across[1] * down[0] <= 0:
            raise ValueError(f"the points are mirrored or out of order: {ORDER}")
    return [p.astype(np.float32) for p in points]


def detect_points(image: np.ndarray, folders: Sequence[str]) -> np.ndarray:
    """The points of the largest face that insightface sees in (h, w, 3) bytes.

    ``folders`` are where model packs may lie, unpacked; nothing is downloaded.
    """
    pack = next((f for f in folders if glob.glob(os.path.join(glob.escape(f), "*.onnx"))), None)
    try:
        from insightface.app import FaceAnalysis
    except ImportError:
        pack = None
    if pack is None:
        raise ValueError(
            f"no face points: write them into 'points' as [[x, y], ...] ({ORDER}), or install "
            f"insightface with a model pack in {' or '.join(folders)}"
        )
    detector = FaceAnalysis(
        name=pack, allowed_modules=["detection"], providers=["CPUExecutionProvider"]
    )
    detector.prepare(ctx_id=-1)
    found = detector.get(np.ascontiguousarray(image[..., ::-1]))
    if not found:
        raise ValueError(f"no face found: write its five points into 'points' ({ORDER})")
    largest = max(found, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
    return np.asarray(largest.kps, np.float32)


def prepare_crop(
    image: np.ndarray, points: np.ndarray, size: int, mask: np.ndarray | None = None
) -> np.ndarray:
    """The aligned crop (size, size, 3) of bytes, black where ``mask`` (h, w) in [0, 1] is 0.

    Without a mask the head is an ellipse fitted to the points.
    """
    height, width = image.shape[:2]
    if np.any(points < -0.5) or np.any(points > np.array([width, height]) - 0.5):
        raise ValueError(f"points lie outside the photo, which is {width} x {height}")
    if mask is not None and mask.shape != (height, width):
        raise ValueError(f"the mask is {mask.shape[::-1]}, the photo {width} x {height}")
    if mask is not None and not mask.max() >= 0.5:
        raise ValueError(BLACK)
    if max(height, width) > LONGEST_SIDE:
        scale = LONGEST_SIDE / max(height, width)
        small = max(1, int(width * scale)), max(1, int(height * scale))
        resized = Image.fromarray(image).resize(small, Image.Resampling.BICUBIC)
        ratio = np.array(small) / (width, height)
        image, points = np.asarray(resized), ((points + 0.5) * ratio - 0.5).astype(np.float32)
        mask = None if mask is None else resize_area(mask, small[::-1])
    mask = _head(image.shape[:2], points) if mask is None else np.clip(mask, 0, 1)
    blanked = np.rint(image * mask.astype(np.float32)[..., None]).astype(np.uint8)
    return _warp(blanked, _inverse(_similarity(points, _TEMPLATE * (size / _SIZE))), size)


def resize_area(mask: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Area averaging of (..., h, w) to ``size``."""
    rows, columns = (_area_weights(mask.shape[-2 + i], size[i]) for i in (0, 1))
    return rows @ mask.astype(np.float32) @ columns.T


def _area_weights(inputs: int, outputs: int) -> np.ndarray:
    """How much of each output cell each input cell covers; rows sum to 1."""
    edges = np.arange(outputs + 1) * (inputs / outputs)
    cells = np.arange(inputs)
    low, high = np.maximum(edges[:-1, None], cells), np.minimum(edges[1:, None], cells + 1)
    return (np.maximum(high - low, 0.0) * (outputs / inputs)).astype(np.float32)


def _similarity(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """Rotation, scale and shift (2, 3) that bring points to the template (Umeyama 1991)."""
    points = points.astype(np.float64)
    source, target = points - points.mean(0), template - template.mean(0)
    spread = (source**2).sum()
    if spread <= 1e-12:
        raise ValueError("the points coincide")
    cosine = (source * target).sum() / spread
    sine = (source[:, 0] * target[:, 1] - source[:, 1] * target[:, 0]).sum() / spread
    linear = np.array([[cosine, -sine], [sine, cosine]])
    return np.column_stack([linear, template.mean(0) - linear @ points.mean(0)])


def _inverse(matrix: np.ndarray) -> np.ndarray:
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack([linear, -linear @ matrix[:, 2]])


def _head(shape: tuple[int, int], points: np.ndarray) -> np.ndarray:
    """The ellipse of a head around the points, its edge a pixel wide."""
    matrix = _similarity(points, _TEMPLATE)
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    where = np.stack([columns, rows], -1) @ matrix[:, :2].T + matrix[:, 2]
    unit = (where - _CENTRE) / _HALF_AXES
    radius, slope = np.linalg.norm(unit, axis=-1), np.linalg.norm(unit / _HALF_AXES, axis=-1)
    distance = (radius - 1.0) * (radius + 1e-6) / (slope + 1e-8)
    return np.clip(0.5 - distance / np.hypot(*matrix[0, :2]), 0.0, 1.0).astype(np.float32)


def _warp(image: np.ndarray, inverse: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, black outside: output pixel p shows the image at ``inverse`` p."""
    inverse = inverse.astype(np.float32).astype(np.float64)
    at = np.arange(size)
    pads = np.pad(image, ((2, 2), (2, 2), (0, 0))).astype(np.float32)
    whole, part = [], []
    for (across, down, shift), side in zip(inverse, image.shape[1::-1], strict=True):
        rows = (down * at + shift).astype(np.float32)
        place = (across * at[None] + rows[:, None]).astype(np.float32)
        floor = np.floor(place)
        whole.append((np.clip(floor, -2, side) + 2).astype(int))
        part.append((place - floor)[..., None])
    (x, y), (right, below) = whole, part
    a, b, c, d = (pads[y + i, x + j] for i in (0, 1) for j in (0, 1))
    top, bottom = a + right * (b - a), c + right * (d - c)
    return np.rint(top + below * (bottom - top)).astype(np.uint8)


def to_bytes(image: Any) -> np.ndarray:
    """A picture (h, w, 3) in [0, 1], as ComfyUI has it, as bytes."""
    return np.rint(255.0 * np.clip(np.asarray(image, np.float32)[..., :3], 0, 1)).astype(np.uint8)
