"""What is measured of a face: sharpness, clipping, pose, the hash of the picture."""

import numpy as np
from jaxtyping import Bool, Float, Int8, UInt8
from PIL import Image
from scipy import fft, ndimage

from fact_jax.face.align import ARCFACE_TEMPLATE, similarity_transform, warp_affine_batch

# A face's points in millimetres, x to the right of the picture, y down, z towards the camera:
# means of adults (eyes 63 mm apart, mouth 50 mm wide), the nose tip 28 mm before the eyes' plane.
_HEAD_POINTS = np.array(
    [
        [-31.5, -33.0, 0.0],
        [31.5, -33.0, 0.0],
        [0.0, 3.0, 28.0],
        [-25.0, 36.0, 2.0],
        [25.0, 36.0, 2.0],
    ]
)
HASH_SIDE = 16
"""The hash holds the signs of this many frequencies each way, but for the mean."""
COLOUR_SIDE = 8
_VIEW, _VIEW_SIDE = 168.0, 64
"""What the hash sees: a square of so many template units (112 is the crop), in so many pixels."""


def sharpness(crop: UInt8[np.ndarray, "h w 3"]) -> float:
    """Variance of the Laplacian of the grey crop, in grey levels squared."""
    return float(ndimage.laplace(_grey(crop)).var())


def clipped(crop: UInt8[np.ndarray, "h w 3"]) -> float:
    """Share of pixels that are black (below 5) or white (above 250)."""
    grey = _grey(crop)
    return float(((grey < 5) | (grey > 250)).mean())


def pose(points: Float[np.ndarray, "5 2"]) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees, of a mean head under scaled orthographic projection.

    The affine camera that fits five points best (least squares), its rows made orthogonal (by the
    polar decomposition). Yaw is positive where the face looks to the picture's right, pitch where
    it looks down, roll where it is turned clockwise. A rough measure: heads differ.
    """
    head = _HEAD_POINTS - _HEAD_POINTS.mean(0)
    centred = np.asarray(points, np.float64) - np.mean(points, 0)
    camera = np.linalg.lstsq(head, centred, rcond=None)[0].T
    left, _, right = np.linalg.svd(camera, full_matrices=False)
    x, y = left @ right
    z = np.cross(x, y)
    yaw = np.arctan2(x[2], np.hypot(x[0], x[1]))
    pitch = np.arctan2(y[2], z[2])
    roll = np.arctan2(-x[1], x[0])
    yaw, pitch, roll = np.degrees([yaw, pitch, roll]).tolist()
    return yaw, pitch, roll


def picture_view(
    image: UInt8[np.ndarray, "h w 3"], points: Float[np.ndarray, "5 2"]
) -> UInt8[np.ndarray, "64 64 3"]:
    """The picture around the face, on the face's template; beyond its borders the edge is repeated.

    So cutting, scaling and turning a picture changes nothing of its view but near the borders.
    """
    scale = _VIEW_SIDE / _VIEW
    template = (ARCFACE_TEMPLATE - 56.0) * scale + (_VIEW_SIDE - 1) / 2
    matrix = similarity_transform(points, template)
    factor = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if factor < 1:  # averaged, not sampled
        height, width = image.shape[:2]
        size = max(1, round(width * factor)), max(1, round(height * factor))
        ratio = np.array([size[0] / width, size[1] / height])
        image = np.asarray(Image.fromarray(image).resize(size, Image.LANCZOS))
        points = (points + 0.5) * ratio - 0.5
    margin = _VIEW_SIDE
    padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    matrix = similarity_transform(points + margin, template)
    return warp_affine_batch(padded[None], matrix[None], _VIEW_SIDE)[0]


def view_hash(view: UInt8[np.ndarray, "64 64 3"]) -> Bool[np.ndarray, " bits"]:
    """Signs of the low frequencies (DCT) of a grey view, 255 bits."""
    waves = fft.dctn(_grey(view), norm="ortho")[:HASH_SIDE, :HASH_SIDE]
    return waves.reshape(-1)[1:] > 0


def view_colours(view: UInt8[np.ndarray, "64 64 3"]) -> UInt8[np.ndarray, "cells cells 3"]:
    """Means of the cells of a view, 8 x 8."""
    side = _VIEW_SIDE // COLOUR_SIDE
    cells = view.reshape(COLOUR_SIDE, side, COLOUR_SIDE, side, 3)
    return np.rint(cells.mean((1, 3))).astype(np.uint8)


def mirrored(hashes: Int8[np.ndarray, "n bits"]) -> Int8[np.ndarray, "n bits"]:
    """The hashes (as -1 and 1) of the mirrored pictures: odd frequencies in x change their sign."""
    odd = np.arange(HASH_SIDE * HASH_SIDE)[1:] % HASH_SIDE % 2
    return hashes * (1 - 2 * odd).astype(np.int8)


def quantized(vector: Float[np.ndarray, " d"]) -> Int8[np.ndarray, " d"]:
    """A direction in 8 bits: products of two are then exact in float32, on every machine."""
    return np.rint(vector * (127.0 / np.abs(vector).max())).astype(np.int8)


def _grey(pixels: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w"]:
    """Luma of ITU-R BT.601."""
    return pixels @ np.array([0.299, 0.587, 0.114])
