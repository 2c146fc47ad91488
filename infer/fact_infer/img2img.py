"""Inputs of image-to-image and masked image-to-image."""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float, UInt8

from fact_infer.parts import BaseModel
from fact_infer.request import GenerationParams
from fact_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Img2ImgInput:
    """Pictures that a generation starts from, one for each that is drawn.

    ``latent_mask`` says which latents are drawn anew; the others are the picture's own, noised to
    each step's level. ``strength`` in (0, 1] is the share of the steps that are
    taken: the pictures are noised to the level of the first one. ``masks``, in [0, 1], are what
    :meth:`finish` takes of what was drawn; None: all of it.
    """

    images: UInt8[np.ndarray, "b h w 3"]
    latent_mask: Bool[np.ndarray, "b rows columns"]
    strength: float
    masks: Float[np.ndarray, "b h w"] | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)

    @classmethod
    def whole(
        cls, images: UInt8[np.ndarray, "b h w 3"], strength: float, base: BaseModel
    ) -> "Img2ImgInput":
        """Image-to-image: all latents are drawn anew."""
        count, height, width, _ = images.shape
        latent_mask = np.ones(
            (count, height // base.vae.downscale, width // base.vae.downscale), bool
        )
        return cls(images=images, latent_mask=latent_mask, strength=strength)

    @classmethod
    def masked(
        cls,
        images: UInt8[np.ndarray, "b h w 3"],
        masks: Float[np.ndarray, "b h w"],
        strength: float,
        base: BaseModel,
    ) -> "Img2ImgInput":
        """Masked image-to-image: what the masks cover is drawn anew."""
        latent_mask = np.stack([to_latent_mask(mask, base.vae.downscale) for mask in masks])
        return cls(images=images, latent_mask=latent_mask, strength=strength, masks=masks)

    def finish(self, drawn: UInt8[np.ndarray, "n h w 3"]) -> UInt8[np.ndarray, "n h w 3"]:
        """The first pictures, as drawn, with their own pixels where the masks are 0."""
        if self.masks is None:
            return drawn
        count = len(drawn)
        return blend(self.images[:count], drawn, self.masks[:count])

    def start(self, steps: int) -> int:
        """The first step that is taken."""
        return first_step(self.strength, steps)

    def check(self, base: BaseModel, params: GenerationParams, count: int) -> None:
        """UserError unless the input fits what is to be drawn."""
        rows, columns = base.latent_size(params)
        factor = base.vae.downscale
        wanted = (count, rows * factor, columns * factor)
        masks = self.latent_mask
        if self.images.shape[:3] != wanted or masks.shape != (count, rows, columns):
            raise UserError(
                f"the canvas has {len(self.images)} pictures of {self.images.shape[2]} x "
                f"{self.images.shape[1]}, {len(masks)} masks of {masks.shape[2]} x "
                f"{masks.shape[1]} cells; {count} of {wanted[2]} x {wanted[1]} with "
                f"{columns} x {rows} cells are to be drawn"
            )
        self.start(params.steps)


def to_latent_mask(mask: Float[np.ndarray, "h w"], factor: int) -> Bool[np.ndarray, "rows columns"]:
    """Which latents, ``factor`` pixels a side, a mask touches anywhere.

    So that all that is blended in has been drawn.
    """
    height, width = mask.shape
    return mask.reshape(height // factor, factor, width // factor, factor).max((1, 3)) > 0.0


def blend(
    image: UInt8[np.ndarray, "*b h w 3"],
    drawn: UInt8[np.ndarray, "*b h w 3"],
    mask: Float[np.ndarray, "*b h w"],
) -> UInt8[np.ndarray, "*b h w 3"]:
    """Alpha blending: an image with what was drawn over it, untouched where the mask is 0."""
    share = mask[..., None].astype(np.float32)
    mixed = np.rint(image * (1 - share) + drawn * share).astype(np.uint8)
    return np.where(share > 0, mixed, image)


def check_strength(strength: float) -> None:
    """UserError unless the strength is a share of the steps."""
    if not (math.isfinite(strength) and 0.0 < strength <= 1.0):
        raise UserError(f"strength must lie above 0 and up to 1, got {strength:g}")


def first_step(strength: float, steps: int) -> int:
    """The first of ``steps`` that is taken at this strength; UserError if that leaves none."""
    taken = min(int(steps * strength), steps)
    if taken < 1:
        raise UserError(
            f"a strength of {strength:g} leaves none of {steps} steps: it must be at least "
            f"{1 / steps:g}, or there must be more steps"
        )
    return steps - taken
