"""Similarity alignment of a face to the ArcFace template.

The warp repeats the arithmetic of OpenCV's ``warpAffine`` since its 4.11, bit for bit: coordinates
in float32, each term rounded once as a fused multiply-add does it, and float32 interpolation.
Earlier OpenCV rounded coordinates to 1/32 px; crops of the two differ by a few levels of 255.
Everything is batched: one photo is a batch of one, and training and inference share the code.
"""

import numpy as np
from jaxtyping import Float, UInt8

CROP_SIZE = 112
# Left eye, right eye, nose tip, left and right mouth corner (as seen by the viewer), x then y.
ARCFACE_TEMPLATE = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)
ARCFACE_TEMPLATE.setflags(write=False)

# Output pixels at a time: the temporaries of a chunk stay in the cache.
_CHUNK_PIXELS = 1 << 14


def template_points(size: int) -> Float[np.ndarray, "5 2"]:
    """The ArcFace template scaled to a crop of ``size`` x ``size``."""
    return ARCFACE_TEMPLATE * (size / CROP_SIZE)


def similarity_transform(
    points: Float[np.ndarray, "*batch n 2"], template: Float[np.ndarray, "n 2"]
) -> Float[np.ndarray, "*batch 2 3"]:
    """Least-squares rotation, scale and shift that brings ``points`` to ``template``, float64.

    Umeyama (1991) without reflection. In the plane it has a closed form: with points as complex
    numbers about their mean, the factor is ``sum(conj(p) t) / sum(|p|^2)``.
    Raises ValueError when the points coincide.
    """
    points = np.asarray(points, np.float64)
    template = np.asarray(template, np.float64)
    point_mean = points.mean(-2, keepdims=True)
    template_mean = template.mean(-2)
    source = points - point_mean
    target = template - template_mean
    spread = (source**2).sum((-1, -2))
    if not np.all(spread > 1e-12):
        raise ValueError("the points coincide or are not finite: no similarity transform fits them")
    x, y = source[..., 0], source[..., 1]
    cosine = (x * target[:, 0] + y * target[:, 1]).sum(-1) / spread
    sine = (x * target[:, 1] - y * target[:, 0]).sum(-1) / spread
    linear = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    shift = template_mean[:, None] - linear @ np.swapaxes(point_mean, -1, -2)
    return np.concatenate([linear, shift], -1)


def transform_points(
    points: Float[np.ndarray, "*batch n 2"], matrix: Float[np.ndarray, "*batch 2 3"]
) -> Float[np.ndarray, "*batch n 2"]:
    """Apply ``matrix`` to points: ``A p + t``."""
    return points @ np.swapaxes(matrix[..., :2], -1, -2) + matrix[..., None, :, 2]


def invert_affine(matrix: Float[np.ndarray, "*batch 2 3"]) -> Float[np.ndarray, "*batch 2 3"]:
    """The inverse map, float64, in the order of operations that OpenCV uses (rounding matters)."""
    m = np.asarray(matrix, np.float64)
    determinant = m[..., 0, 0] * m[..., 1, 1] - m[..., 0, 1] * m[..., 1, 0]
    if np.any(determinant == 0) or not np.all(np.isfinite(m)):
        raise ValueError("the affine matrix has no inverse")
    factor = 1.0 / determinant
    inverse = np.empty_like(m)
    inverse[..., 0, 0] = m[..., 1, 1] * factor
    inverse[..., 0, 1] = m[..., 0, 1] * -factor
    inverse[..., 1, 0] = m[..., 1, 0] * -factor
    inverse[..., 1, 1] = m[..., 0, 0] * factor
    for row in range(2):
        inverse[..., row, 2] = (
            -inverse[..., row, 0] * m[..., 0, 2] - inverse[..., row, 1] * m[..., 1, 2]
        )
    return inverse


def warp_affine_batch(
    images: UInt8[np.ndarray, "b h w 3"],
    matrices: Float[np.ndarray, "b 2 3"],
    size: int | tuple[int, int],
) -> UInt8[np.ndarray, "b height width 3"]:
    """Bilinear warps with a black border: output pixel p shows the image at ``matrix^-1 p``.

    Each image has a matrix of its own, which maps its coordinates to those of the output; ``size``
    is a side or (height, width). In chunks of bounded memory.
    """
    height, width = (size, size) if isinstance(size, int) else size
    inverse = invert_affine(matrices)
    out = np.empty((len(images), height, width, 3), np.uint8)
    chunk = max(1, _CHUNK_PIXELS // max(1, height * width))
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        out[part] = _warp_chunk(images[part], inverse[part], height, width)
    return out


def align_face(
    image: UInt8[np.ndarray, "h w 3"],
    points: Float[np.ndarray, "5 2"],
    size: int = CROP_SIZE,
    mask: Float[np.ndarray, "h w"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Crop of a face whose five points lie on the ArcFace template; see ``align_batch``."""
    masks = None if mask is None else mask[None]
    return align_batch(image[None], np.asarray(points)[None], masks, size)[0]


def align_batch(
    images: UInt8[np.ndarray, "b h w 3"],
    points: Float[np.ndarray, "b 5 2"],
    masks: Float[np.ndarray, "b h w"] | None = None,
    size: int = CROP_SIZE,
) -> UInt8[np.ndarray, "b size size 3"]:
    """Crops of faces whose five points lie on the template scaled to ``size``.

    The background goes to 0 by the mask (in [0, 1], 1 on the head) before the warp, so what is
    outside the head, and outside the image, is black.
    """
    matrices = similarity_transform(points, template_points(size))
    if masks is None:
        return warp_affine_batch(images, matrices, size)
    crops = np.empty((len(images), size, size, 3), np.uint8)
    chunk = max(1, _CHUNK_PIXELS // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        blanked = blank_background(images[part], masks[part])
        crops[part] = warp_affine_batch(blanked, matrices[part], size)
    return crops


def blank_background(
    images: UInt8[np.ndarray, "*batch h w 3"], masks: Float[np.ndarray, "*batch h w"]
) -> UInt8[np.ndarray, "*batch h w 3"]:
    """The images times their masks in [0, 1], rounded: black where the mask is 0."""
    masks = np.asarray(masks, np.float32)
    blanked = np.empty_like(images)
    for channel in range(3):
        blanked[..., channel] = np.rint(images[..., channel] * masks)
    return blanked


def _source_coordinates(
    inverse: Float[np.ndarray, "b 3"], height: int, width: int
) -> tuple[Float[np.ndarray, "b height width"], Float[np.ndarray, "b height width"]]:
    """One image coordinate of every output pixel, as floor and fraction.

    A float32 product is exact in float64, so adding there and rounding to float32 is what a fused
    multiply-add does, on every machine.
    """
    factor_x, factor_y, shift = np.moveaxis(inverse.astype(np.float32).astype(np.float64), 1, 0)
    rows = (factor_y[:, None] * np.arange(height) + shift[:, None]).astype(np.float32)
    columns = factor_x[:, None] * np.arange(width)
    coordinate = (columns[:, None, :] + rows[:, :, None]).astype(np.float32)
    whole = np.floor(coordinate)
    return whole, coordinate - whole


def _warp_chunk(
    images: UInt8[np.ndarray, "b h w 3"],
    inverse: Float[np.ndarray, "b 2 3"],
    height: int,
    width: int,
) -> UInt8[np.ndarray, "b height width 3"]:
    count, image_height, image_width, _ = images.shape
    x, right = _source_coordinates(inverse[:, 0], height, width)
    y, below = _source_coordinates(inverse[:, 1], height, width)
    # Two black pixels on every side: taps at -1 and w read them, and so does what is clipped.
    # The fourth byte lets one 32-bit read fetch a pixel.
    padded = np.zeros((count, image_height + 4, image_width + 4, 4), np.uint8)
    padded[:, 2:-2, 2:-2, :3] = images
    stride = image_width + 4
    index = (np.clip(y, -2, image_height) + 2).astype(np.intp) * stride
    index += (np.clip(x, -2, image_width) + 2).astype(np.intp)
    index += (np.arange(count) * (image_height + 4) * stride)[:, None, None]

    pixels = padded.view(np.uint32).ravel()
    corners = [pixels.take(index + offset) for offset in (0, 1, stride, stride + 1)]
    corners = [corner.view(np.uint8).reshape(*index.shape, 4) for corner in corners]
    out = np.empty((count, height, width, 3), np.uint8)
    for channel in range(3):
        a, b, c, d = (corner[..., channel].astype(np.float32) for corner in corners)
        top = a + right * (b - a)
        bottom = c + right * (d - c)
        out[..., channel] = np.rint(top + below * (bottom - top)).astype(np.uint8)
    return out
