"""FACT put together: a frozen base, a face encoder, a resampler, and adapters in the UNet."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fact_jax.errors import UserError
from fact_jax.models.resampler import Resampler
from fact_jax.models.transface import TransFace
from fact_jax.models.unet import UNet

Model = Callable[[Float[Array, "b h w c"], Array, Int[Array, ""]], Float[Array, "b h w c"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How text and face steer a generation.

    ``text``: classifier-free guidance (1: none). ``negative_face``: what the negative branch sees,
    the null face or the same face. ``face``: None gives the two branches of the released code; a
    number gives the face a guidance of its own through a third branch (text without face).
    ``face_scale`` is the adapter's strength, in the steps from ``start`` up to ``stop`` of the
    trajectory (fractions); outside that window the adapter is silent.
    """

    text: float = 5.0
    face: float | None = None
    negative_face: Literal["null", "same"] = "null"
    face_scale: float | Float[Array, ""] = 1.0
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise UserError(
                f"the face window must satisfy 0 <= start <= stop <= 1, got {self.start} to "
                f"{self.stop}"
            )
        if self.negative_face not in ("null", "same"):
            raise UserError(f"negative face must be 'null' or 'same', got {self.negative_face!r}")

    def scale_at(self, i: Int[Array, ""], steps: int) -> Float[Array, ""]:
        """The adapter's strength at step ``i`` of ``steps``."""
        inside = (i >= self.start * steps) & (i < self.stop * steps)
        return jnp.where(inside, self.face_scale, 0.0)


def encode_face(
    encoder: TransFace, resampler: Resampler, crops: Float[Array, "b p s s 3"]
) -> Float[Array, "b m d"]:
    """Face tokens of each person from ``p`` aligned crops in [-1, 1], photo after photo."""
    b, p = crops.shape[:2]
    tokens = encoder.tokens(crops.reshape(b * p, *crops.shape[2:]))
    return resampler(tokens).reshape(b, -1, resampler.config.output_dim)


def null_face(resampler: Resampler, tokens: int, photos: int = 1) -> Float[Array, "1 m d"]:
    """The condition 'no face': the resampler of all-zero encoder tokens, once a photo."""
    zeros = jnp.zeros((1, tokens, resampler.config.embedding_dim))
    return jnp.tile(resampler(zeros), (1, photos, 1))


def guided_model(
    unet: UNet,
    *,
    text: Float[Array, "b n d"],
    negative_text: Float[Array, "b n d"],
    face: Float[Array, "b m f"] | None = None,
    no_face: Float[Array, "#b m f"] | None = None,
    guidance: Guidance,
    steps: int,
) -> Model:
    """The function that samplers call: the UNet under guidance, all branches in one batch.

    Face keys and values are computed here, once a generation. With ``face`` None the adapters are
    left out and the result is the base model's. Branches, first to last: negative, (text without
    face,) text with face. ``no_face`` is what a branch without the face sees; the guidance that has
    no such branch needs none.
    """
    branches = [negative_text, text]
    weights = [1.0 - guidance.text, guidance.text]
    keys = None
    if face is not None:
        away = guidance.negative_face == "null" and guidance.text != 1.0
        if no_face is None and (away or guidance.face is not None):
            raise UserError("guidance away from the null face needs no_face (see null_face)")
        empty = face if no_face is None else jnp.broadcast_to(no_face, face.shape)
        faces = [face if guidance.negative_face == "same" else empty, face]
        if guidance.face is not None:
            # e(0, 0) + g_t (e(t, 0) - e(0, 0)) + g_f (e(t, f) - e(t, 0))
            branches, faces = [negative_text, text, text], [empty, empty, face]
            weights = [1.0 - guidance.text, guidance.text - guidance.face, guidance.face]
        if guidance.text == 1.0 and guidance.face is None:
            faces = faces[-1:]
    if guidance.text == 1.0 and (face is None or guidance.face is None):
        branches, weights = branches[-1:], [1.0]
    context = jnp.concatenate(branches)
    if face is not None:
        keys = unet.face_keys(jnp.concatenate(faces))

    def model(x: Float[Array, "b h w c"], t: Array, i: Int[Array, ""]) -> Float[Array, "b h w c"]:
        count = len(weights)
        scale = guidance.scale_at(i, steps)
        out = unet(jnp.tile(x, (count, 1, 1, 1)), t, context, face=keys, face_scale=scale)
        return sum(w * part for w, part in zip(weights, jnp.split(out, count), strict=True))

    return model


def initial_noise(
    seeds: Int[Array, " b"], height: int, width: int, channels: int
) -> Float[Array, "b h w c"]:
    """Unit noise, one picture a seed, the same whatever else is in the batch."""
    draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (height, width, channels)))
    return draw(seeds)
