"""Head masks: from a parsing map, a mask file, or an ellipse fitted to the five points."""

import os
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from PIL import Image, ImageOps

from fact_jax.face.align import (
    ARCFACE_TEMPLATE,
    invert_affine,
    similarity_transform,
    transform_points,
)
from fact_jax.face.images import ImageFile, open_image
from fact_jax.utils.errors import UserError

# Label numbers of CelebAMask-HQ, which the public BiSeNet face-parsing models give: 1 skin,
# 2 and 3 brows, 4 and 5 eyes, 6 glasses, 7 and 8 ears, 10 nose, 11 mouth, 12 and 13 lips, 17 hair.
# Not the head: 0 background, 9 earring, 14 neck, 15 necklace, 16 cloth, 18 hat.
HEAD_LABELS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 13, 17})

# The head in template coordinates, where the eyes are 35.2 apart (63 mm in an adult): with hair
# about 208 mm wide and 265 mm from crown to below the chin. Generous: hair is identity too, and
# a smile pulls the points together and with them the fitted scale.
_HEAD_CENTRE = (56.0, 51.0)
_HEAD_HALF_AXES = (58.0, 74.0)
# The face alone: from cheekbone to cheekbone about 140 mm, from the hairline to the chin 185 mm.
_FACE_CENTRE = (56.0, 65.0)
_FACE_HALF_AXES = (40.0, 52.0)


class HeadMask(NamedTuple):
    """A soft mask in [0, 1], 1 on the head, and in words what it was made from."""

    mask: Float[np.ndarray, "h w"]
    source: str


def head_mask(
    image_shape: tuple[int, ...],
    points: Float[np.ndarray, "5 2"],
    *,
    parsing: str | os.PathLike | Shaped[np.ndarray, "..."] | None = None,
    mask_file: ImageFile | None = None,
    labels: Collection[int] = HEAD_LABELS,
) -> HeadMask:
    """The head's mask for an image of ``image_shape`` (h, w, ...).

    The first that is given wins: a parsing map (an array of label numbers, or a one-channel image
    file of them; ``labels`` are the head), a mask file (grey, 0 to full scale), else an ellipse
    over face and hair fitted to ``points``. Raises UserError for a file of another size than the
    photo, and for an empty mask.
    """
    height, width = image_shape[:2]
    if parsing is not None:
        mask, source = _mask_from_parsing(parsing, labels)
    elif mask_file is not None:
        mask, source = read_mask(mask_file), f"the mask file {mask_file}"
    else:
        return HeadMask(ellipse_mask((height, width), points), "an ellipse fitted to the points")
    if mask.shape != (height, width):
        raise UserError(
            f"{source} is {mask.shape[1]} x {mask.shape[0]}, the photo is {width} x {height} "
            "(upright, as its EXIF orientation says): they must be of one size"
        )
    if not mask.any():
        raise UserError(f"{source} marks no head: every pixel is background")
    return HeadMask(mask, source)


def _mask_from_parsing(
    parsing: str | os.PathLike | Shaped[np.ndarray, "..."], labels: Collection[int]
) -> tuple[Float[np.ndarray, "h w"], str]:
    if isinstance(parsing, np.ndarray):
        source, numbers = "the parsing map", parsing
    else:
        source = f"the parsing map {parsing}"
        with open_image(parsing) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise UserError(
                    f"{source} has colour channels ({image.mode}): it must be a one-channel image "
                    "of label numbers"
                )
            numbers = np.asarray(image)
    if numbers.dtype == bool:
        numbers = numbers.astype(np.uint8)
    if numbers.ndim != 2 or not np.issubdtype(numbers.dtype, np.integer):
        raise UserError(
            f"{source} has shape {numbers.shape} and type {numbers.dtype}: "
            "it must be (h, w) integers"
        )
    return np.isin(numbers, list(labels)).astype(np.float32), source


def read_mask(path: ImageFile) -> Float[np.ndarray, "h w"]:
    """A mask file as float32 in [0, 1]: grey values are soft, a file of only 0 and 1 is hard.

    What is transparent is background.
    """
    with open_image(path) as opened:
        # Upright as the photos that masks belong to.
        image = ImageOps.exif_transpose(opened)
        if image.mode == "F":
            values, full = np.nan_to_num(np.asarray(image)), 255.0
        elif image.mode in ("I", "I;16", "I;16B"):
            values, full = np.asarray(image).astype(np.float32), 65535.0
        else:
            if image.has_transparency_data:
                cover = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", cover.size, "black"), cover)
            colours = np.asarray(image.convert("RGB"))
            if (colours != colours[..., :1]).any():
                raise UserError(
                    f"the mask file {path} has colours: a mask is grey, white on the head"
                )
            values, full = colours[..., 0].astype(np.float32), 255.0
    if values.max(initial=0.0) <= 1.0:
        full = 1.0
    return np.clip(values / full, 0.0, 1.0)


def ellipse_mask(
    shape: tuple[int, int], points: Float[np.ndarray, "5 2"]
) -> Float[np.ndarray, "h w"]:
    """An upright head's ellipse, turned, scaled and shifted with the points; its edge is soft."""
    return _ellipse(shape, points, _HEAD_CENTRE, _HEAD_HALF_AXES)


def face_mask(
    head: Float[np.ndarray, "h w"], points: Float[np.ndarray, "5 2"]
) -> Float[np.ndarray, "h w"]:
    """The face without hair and ears: an ellipse fitted to the points, inside the head's mask."""
    return head * _ellipse(head.shape, points, _FACE_CENTRE, _FACE_HALF_AXES)


def _ellipse(
    shape: tuple[int, int],
    points: Float[np.ndarray, "5 2"],
    centre: tuple[float, float],
    half_axes: tuple[float, float],
) -> Float[np.ndarray, "h w"]:
    """An ellipse of the template in the photo."""
    to_template = similarity_transform(points, ARCFACE_TEMPLATE)
    scale = np.hypot(to_template[0, 0], to_template[1, 0])
    # In a large photo it is small: beyond a circle around it there is nothing to compute.
    middle = transform_points(np.array([centre]), invert_affine(to_template))[0]
    reach = max(half_axes) / scale + 2
    low, high = (
        np.clip(np.floor(middle[::-1] + side), 0, shape).astype(int) for side in (-reach, reach + 1)
    )
    window = tuple(slice(*ends) for ends in zip(low, high, strict=True))
    rows, columns = np.mgrid[window].astype(np.float64)
    where = transform_points(np.stack([columns, rows], -1).reshape(-1, 2), to_template)
    distance = _distance(where - centre, half_axes) / scale
    mask = np.zeros(shape, np.float32)
    mask[window] = np.clip(0.5 - distance, 0.0, 1.0).reshape(rows.shape)
    return mask


def box_mask(shape: tuple[int, int], box: Sequence[float]) -> Float[np.ndarray, "h w"]:
    """The ellipse inside a box (left, top, right, bottom) in pixels; its edge is soft."""
    left, top, right, bottom = box
    rows, columns = np.mgrid[: shape[0], : shape[1]] + 0.5
    away = np.stack([columns - (left + right) / 2, rows - (top + bottom) / 2], -1)
    distance = _distance(away, ((right - left) / 2, (bottom - top) / 2))
    return np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)


def _distance(
    away: Float[np.ndarray, "*n 2"], half_axes: tuple[float, float]
) -> Float[np.ndarray, "*n"]:
    """From the edge of an ellipse around 0, negative inside; to first order, f / |grad f|."""
    unit = away / half_axes
    radius = np.linalg.norm(unit, axis=-1)
    slope = np.linalg.norm(unit / half_axes, axis=-1)
    # Both vanish at the centre, where any length will do.
    return (radius - 1.0) * (radius + 1e-6) / (slope + 1e-8)


def crop_square(points: Float[np.ndarray, "5 2"], size: float = 112.0) -> Float[np.ndarray, "4"]:
    """Box (left, top, right, bottom) around what the aligned crop shows of the photo."""
    from_template = invert_affine(similarity_transform(points, ARCFACE_TEMPLATE))
    corners = np.array([[0.0, 0.0], [size, 0.0], [0.0, size], [size, size]])
    corners = transform_points(corners, from_template)
    return np.concatenate([corners.min(0), corners.max(0)])


def area_weights(inputs: int, outputs: int) -> Float[np.ndarray, "outputs inputs"]:
    """Row i: how much of output cell i each input cell covers; every row sums to 1."""
    edges = np.arange(outputs + 1) * (inputs / outputs)
    cells = np.arange(inputs)
    low = np.maximum(edges[:-1, None], cells)
    high = np.minimum(edges[1:, None], cells + 1)
    return (np.maximum(high - low, 0.0) * (outputs / inputs)).astype(np.float32)


def resize_area(
    mask: Float[Array | np.ndarray, "*batch h w"], size: tuple[int, int]
) -> Float[Array, "*batch height width"]:
    """Area averaging to ``size`` (height, width), exact for every ratio; pure, works inside jit.

    Each output cell is the integral of the input over it, by a matrix from both sides: the mean
    is kept, and a cell that the mask covers partly gets that part.
    """
    rows = jnp.asarray(area_weights(mask.shape[-2], size[0]))
    columns = jnp.asarray(area_weights(mask.shape[-1], size[1]))
    # Lower precision of an accelerator's matrix units would make 1 come out as 0.998.
    return jnp.einsum(
        "ph,...hw,qw->...pq", rows, mask, columns, precision=jax.lax.Precision.HIGHEST
    )


def near_points(
    points: Float[Array | np.ndarray, "b 5 2"], size: tuple[int, int], cell: int
) -> Float[Array, "b height width"]:
    """How near each ``cell`` x ``cell`` square of a photo is to the face's points, in [0, 1].

    A Gaussian of a quarter of the eyes' distance around each of the five points (x, y in pixels),
    the largest of them, at the squares' centres; ``size`` counts squares.
    """
    points = jnp.asarray(points, jnp.float32)
    wide = 0.25 * jnp.linalg.norm(points[:, 0] - points[:, 1], axis=-1)
    x, y = ((jnp.arange(n) + 0.5) * cell - 0.5 for n in reversed(size))
    across = (x[None, None, None, :] - points[:, :, 0, None, None]) ** 2
    down = (y[None, None, :, None] - points[:, :, 1, None, None]) ** 2
    spread = 2.0 * jnp.maximum(wide, 1e-3)[:, None, None, None] ** 2
    return jnp.exp(-(across + down) / spread).max(axis=1)
