"""Input pictures of a request: image-to-image, masks, regions, ControlNet."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from PIL import Image, ImageOps

from fact_infer.img2img import Img2ImgInput
from fact_infer.parts import BaseModel
from fact_infer.request import GenerationRequest
from fact_jax.face import read_image
from fact_jax.face.mask import read_mask
from fact_jax.regions import region_masks
from fact_jax.utils.errors import UserError

Note = Callable[[str], None]


def read_inputs(
    request: GenerationRequest, base: BaseModel, batch: int, note: Note = lambda line: None
) -> dict[str, Any]:
    """What ``Pipeline.generate`` takes beside prompts and people, for ``batch`` pictures.

    Files of another size than the pictures are fitted (:func:`fit`); ``note`` is told which.
    Raises UserError for a file that cannot be used.
    """
    size = base.picture_size(request)
    found: dict[str, Any] = {}
    regions = read_regions(request.regions, size, note)
    if regions is not None:
        found["regions"] = regions[None]
        # Said now if a person has no place.
        region_masks(found["regions"], base.latent_size(request), len(base.unet.block_out_channels))
    if request.image is not None:
        found["img2img"] = _read_img2img(request, request.image, base, batch, note)
        found["img2img"].start(request.steps)
    if request.control is not None:
        control = read_image(request.control, to_srgb=True)
        found["control"] = fit(control, size, request.control, note)[None]
        found["control_scale"] = request.control_scale
    return found


def read_regions(
    files: Sequence[Path], size: tuple[int, int], note: Note = lambda line: None
) -> Float[np.ndarray, "k h w"] | None:
    """Where each person is drawn, masks in [0, 1] fitted to ``size``; None without any."""
    masks = [fit(read_mask(file), size, file, note) for file in files]
    return np.stack(masks) if masks else None


def fit(
    pixels: Shaped[np.ndarray, "h w *c"], size: tuple[int, int], path: Path, note: Note
) -> Shaped[np.ndarray, "height width *c"]:
    """A picture (uint8) or a mask (float32) scaled to cover (height, width), both ends cut alike.

    ``path`` is where it comes from, for the note; what has this size already stays as it is.
    """
    height, width = pixels.shape[:2]
    if (height, width) == size:
        return pixels
    cut = "" if _same_shape((height, width), size) else " and cut"
    note(f"{path} is {width} x {height}: scaled{cut} to {size[1]} x {size[0]}, as what is drawn")
    # Lanczos sharpens, which would lead a mask out of [0, 1].
    sharp = pixels.dtype == np.uint8
    how = Image.Resampling.LANCZOS if sharp else Image.Resampling.BILINEAR
    return np.asarray(ImageOps.fit(Image.fromarray(pixels), size[::-1], how))


def _same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether aspect ratios are equal, up to a rounded pixel of the smaller picture."""
    (h, w), (height, width) = sorted((one[:2], other[:2]))
    return abs(h * width - w * height) <= max(height, width)


def _read_img2img(
    request: GenerationRequest, file: Path, base: BaseModel, batch: int, note: Note
) -> Img2ImgInput:
    size, image = base.picture_size(request), read_image(file, to_srgb=True)
    images = np.repeat(fit(image, size, file, note)[None], batch, axis=0)
    if request.image_mask is None:
        return Img2ImgInput.whole(images, request.strength, base)
    mask = read_mask(request.image_mask)
    if mask.shape != size and not _same_shape(mask.shape, image.shape):
        raise UserError(
            f"the mask {request.image_mask} is {mask.shape[1]} x {mask.shape[0]}, {file} is "
            f"{image.shape[1]} x {image.shape[0]}: they must have the same shape"
        )
    mask = fit(mask, size, request.image_mask, note)
    if not mask.any():
        raise UserError(
            f"the mask {request.image_mask} is black: it must be white where {file} is to be drawn "
            "anew"
        )
    return Img2ImgInput.masked(images, np.repeat(mask[None], batch, axis=0), request.strength, base)
