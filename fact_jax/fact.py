"""FACT put together: a frozen base, a face encoder, a resampler, and adapters in the UNet."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fact_jax.losses import normalize
from fact_jax.models.adapter import FaceControls
from fact_jax.models.blocks import AllFaceKeys
from fact_jax.models.resampler import Resampler, ResamplerConfig
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.models.unet import Residuals, UNet
from fact_jax.utils.errors import UserError

Model = Callable[[Float[Array, "b h w c"], Array, Int[Array, ""]], Float[Array, "b h w c"]]
Control = Callable[[Float[Array, "b h w c"], Array, Float[Array, "b n d"]], Residuals]
"""A ControlNet with its picture: residuals for latents, timestep and text of all branches."""
Number = float | Float[Array, ""]
Combine = Literal["concat", "average", "normalized"]
_CHOICES = {"negative_face": ("null", "same"), "combine": ("concat", "average", "normalized")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How text and face steer a generation.

    ``text``: classifier-free guidance (1: none). ``negative_face``: what the negative branch sees,
    the null face or the same face. ``face``: None gives the two branches of the released code; a
    number gives the face a guidance of its own through a third branch (text without face).

    ``face_scale`` is the adapter's strength, in the steps from ``start`` up to ``stop`` of those
    that are drawn (fractions; image-to-image draws the last ones only); outside that window the
    adapter is silent. Several strengths are a schedule: the first at the first step that is drawn,
    the last at the last, lines between.
    ``block_scales``: pairs of a pattern and a factor; a block's strength is times the factor of
    the first pattern (a regular expression) that is found in its path, as ``up_blocks``.

    ``cap`` and ``adain`` see ``fact_jax.models.adapter.FaceControls``; ``combine``:
    :func:`combine_photos`. ``face_scale`` may be traced.
    """

    text: float = 5.0
    face: float | None = None
    negative_face: Literal["null", "same"] = "null"
    face_scale: Number | tuple[float, ...] | Float[Array, " knots"] = 1.0
    block_scales: tuple[tuple[str, float], ...] = ()
    start: float = 0.0
    stop: float = 1.0
    cap: float | None = None
    adain: bool = False
    combine: Combine = "concat"

    def __post_init__(self):
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise UserError(
                f"the face window must satisfy 0 <= start <= stop <= 1, got {self.start} to "
                f"{self.stop}"
            )
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                names = " or ".join(map(repr, choices))
                raise UserError(f"{name.replace('_', ' ')} must be {names}, got {value!r}")
        if self.negative_face == "same" and self.face is not None:
            raise UserError(
                "a guidance of the face's own is away from the null face: negative face 'same' "
                "cannot be had with it, give one of the two"
            )
        if isinstance(self.face_scale, tuple) and not self.face_scale:
            raise UserError("a schedule of face scales needs at least one")
        if self.cap is not None and not (math.isfinite(self.cap) and self.cap > 0):
            raise UserError(f"the cap of the face's increment must be above 0, got {self.cap:g}")
        for pattern, _ in self.block_scales:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"block scale {pattern!r}: not a regular expression: {error}"
                ) from None

    def scale_at(self, i: Int[Array, ""], steps: int) -> Float[Array, ""]:
        """The adapter's strength at step ``i`` of ``steps``."""
        inside = (i >= self.start * steps) & (i < self.stop * steps)
        knots = jnp.asarray(self.face_scale, jnp.float32)
        if knots.ndim:
            last = len(knots) - 1
            knots = jnp.interp(i * last / max(steps - 1, 1), jnp.arange(last + 1), knots)
        return jnp.where(inside, knots, 0.0)

    def block_factors(self, paths: Sequence[str]) -> tuple[float, ...]:
        """What the strength is multiplied by in each of the blocks with these paths.

        Raises UserError for a pattern that is found in none.
        """
        for pattern, _ in self.block_scales:
            if not any(re.search(pattern, path) for path in paths):
                raise UserError(
                    f"block scale {pattern!r}: found in the path of no block: {', '.join(paths)}"
                )
        return tuple(
            next((factor for pattern, factor in self.block_scales if re.search(pattern, path)), 1.0)
            for path in paths
        )


def face_condition(
    encoder: TransFace, crops: Float[Array, "b s s 3"], config: ResamplerConfig
) -> Float[Array, "b n e"]:
    """What a resampler of this configuration takes of aligned crops in [-1, 1].

    FACT: the encoder's tokens. An embedding is of length sqrt(e), as a token of e numbers is.
    """
    if config.embedding:
        embedding = encoder(crops)[1]
        return embedding.shape[1] ** 0.5 * normalize(embedding)[:, None]
    return encoder.tokens(crops, config.encoder_blocks)


def condition_shape(encoder: TransFaceConfig, config: ResamplerConfig) -> tuple[int, int]:
    """Tokens and width of :func:`face_condition`; UserError if the two do not fit."""
    if config.embedding:
        shape = (1, encoder.num_classes)
    else:
        shape = (encoder.tokens * (1 + len(config.encoder_blocks)), encoder.embed_dim)
    inner = range(encoder.depth - 1)  # the last one's are always there
    if wrong := [n for n in config.encoder_blocks if n not in inner]:
        raise UserError(
            f"the resampler takes tokens of the encoder's block {wrong[0]}: it has blocks 0 to "
            f"{encoder.depth - 1}, of which the last comes anyway"
        )
    if config.input_tokens not in (None, shape[0]):
        raise UserError(
            f"the resampler is a linear map of {config.input_tokens} tokens, the encoder gives "
            f"{shape[0]}"
        )
    return shape


def encode_face(
    encoder: TransFace,
    resampler: Resampler,
    crops: Float[Array, "b p s s 3"],
    combine: Combine = "concat",
    people: int = 1,
    photo_mask: Bool[Array, " photos"] | None = None,
) -> Float[Array, "b m d"]:
    """Face tokens for each picture from ``p`` aligned crops in [-1, 1], person after person.

    The photos are of ``people`` people, an equal number of each, one's after another's. Which of
    each person's there are is what ``photo_mask`` says, None: all; see :func:`combine_photos`.
    """
    b, p = crops.shape[:2]
    given = face_condition(encoder, crops.reshape(b * p, *crops.shape[2:]), resampler.config)
    tokens = resampler(given)
    tokens = tokens.reshape(b, people, p // people, *tokens.shape[1:])
    return combine_photos(tokens, combine, photo_mask).reshape(b, -1, tokens.shape[-1])


def combine_photos(
    tokens: Float[Array, "*b p m d"],
    combine: Combine,
    photo_mask: Bool[Array, " p"] | None = None,
) -> Float[Array, "*b tokens d"]:
    """The tokens of one person from those of ``p`` photos: all of them, or ``m`` of their means.

    ``normalized``: means of directions, at the photos' mean length. A plain average is shorter
    the less the photos agree, and a short token is one that the adapter was not trained on.
    Means are of the photos in ``photo_mask``; ``concat`` gives the tokens of the others too.
    """
    if combine == "concat":
        *b, p, m, d = tokens.shape
        return tokens.reshape(*b, p * m, d)
    there = None if photo_mask is None else photo_mask[:, None, None]
    if combine == "average":
        return tokens.mean(axis=-3, where=there)
    lengths = jnp.linalg.norm(tokens, axis=-1, keepdims=True)
    mean = (tokens / jnp.maximum(lengths, 1e-6)).mean(axis=-3, where=there)
    unit = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-6)
    return unit * lengths.mean(axis=-3, where=there)


def null_face(resampler: Resampler, tokens: int, photos: int = 1) -> Float[Array, "1 m d"]:
    """The condition 'no face': the resampler of all-zero encoder tokens, once a photo.

    ``tokens``: how many :func:`condition_shape` says.
    """
    zeros = jnp.zeros((1, tokens, resampler.config.embedding_dim))
    return jnp.tile(resampler(zeros), (1, photos, 1))


class Branch(NamedTuple):
    """A branch of a guided call: with the prompt or the negative one, with the face or without."""

    prompt: bool
    face: bool


def guidance_branches(guidance: Guidance, *, with_face: bool) -> tuple[Branch, ...]:
    """The branches of each call of the UNet, in the order of their rows."""
    if with_face and guidance.face is not None:
        return Branch(False, False), Branch(True, False), Branch(True, True)
    positive = Branch(True, with_face)
    if guidance.text == 1.0:
        return (positive,)
    return Branch(False, with_face and guidance.negative_face == "same"), positive


def guidance_weights(guidance: Guidance, *, with_face: bool) -> tuple[float, ...]:
    """What the output of each of :func:`guidance_branches` is multiplied by; they add up to 1."""
    if with_face and guidance.face is not None:
        # e(0, 0) + g_t (e(t, 0) - e(0, 0)) + g_f (e(t, f) - e(t, 0))
        return 1.0 - guidance.text, guidance.text - guidance.face, guidance.face
    return (1.0,) if guidance.text == 1.0 else (1.0 - guidance.text, guidance.text)


class Conditions(NamedTuple):
    """What all calls of the UNet in one generation share, ``b`` rows for each branch in turn.

    ``face`` are the adapters' keys and values. ``regions``: ``fact_jax.regions``.
    """

    text: Float[Array, "rows n d"]
    face: AllFaceKeys | None = None
    regions: Mapping[int, Bool[Array, "rows k _"]] | None = None


def guided_conditions(
    unet: UNet,
    *,
    text: Float[Array, "b n d"],
    negative_text: Float[Array, "b n d"],
    face: Float[Array, "b m f"] | None = None,
    no_face: Float[Array, "#b m f"] | None = None,
    regions: Mapping[int, Bool[Array | np.ndarray, "#b k _"]] | None = None,
    branches: Sequence[Branch],
) -> Conditions:
    """Text and face of every branch; face keys and values, once a generation.

    With ``face`` None the adapters are left out and the result is the base model's. ``no_face`` is
    what a branch without the face sees; where there is no such branch it may be None. With
    ``regions`` (``fact_jax.regions``) ``face`` holds the tokens of several people, an equal share
    each.
    """
    keys = None
    if face is not None:
        if no_face is None and not all(branch.face for branch in branches):
            raise UserError("guidance away from the null face needs no_face (see null_face)")
        empty = None if no_face is None else jnp.broadcast_to(no_face, face.shape)
        keys = unet.face_keys(
            jnp.concatenate([face if branch.face else empty for branch in branches])
        )
    seen = {
        n: jnp.tile(jnp.broadcast_to(mask, (len(text), *mask.shape[1:])), (len(branches), 1, 1))
        for n, mask in (regions or {}).items()
    }
    texts = [text if branch.prompt else negative_text for branch in branches]
    return Conditions(text=jnp.concatenate(texts), face=keys, regions=seen or None)


def guided_output(
    unet: UNet,
    conditions: Conditions,
    weights: Sequence[Number],
    x: Float[Array, "b h w c"],
    t: Array,
    scales: Sequence[Number],
    control: Control | None = None,
    token_mask: Bool[Array, " m"] | None = None,
    cap: Number | None = None,
    adain: bool | Bool[Array, ""] = False,
    parallel: bool = False,
) -> Float[Array, "b h w c"]:
    """The UNet's output under guidance, all branches in one batch, summed by their ``weights``.

    ``scales`` is the adapter's strength in each block. ``token_mask``, ``cap``, ``adain`` and
    ``parallel``: see ``fact_jax.models.adapter.FaceControls``. All numbers may be traced.
    """
    rows = jnp.tile(x, (len(weights), 1, 1, 1))
    out = unet(
        rows,
        t,
        conditions.text,
        face=conditions.face,
        face_scale=tuple(scales),
        residuals=None if control is None else control(rows, t, conditions.text),
        controls=FaceControls(
            cap=cap,
            adain=adain,
            regions=conditions.regions,
            token_mask=token_mask,
            parallel=parallel,
        ),
    )
    parts = jnp.split(out, len(weights))
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def guided_model(
    unet: UNet,
    *,
    control: Control | None = None,
    guidance: Guidance,
    steps: int,
    parallel: bool = False,
    **conditions: Any,
) -> Model:
    """The function that samplers call: :func:`guided_output` at the strengths of each step.

    ``conditions`` are what :func:`guided_conditions` takes beside the branches.
    """
    with_face = conditions.get("face") is not None
    branches = guidance_branches(guidance, with_face=with_face)
    weights = guidance_weights(guidance, with_face=with_face)
    found = guided_conditions(unet, branches=branches, **conditions)
    factors: tuple[Number, ...] = ()
    if found.face is not None:
        factors = guidance.block_factors([path for path, _ in unet.transformer_blocks()])

    def model(x: Float[Array, "b h w c"], t: Array, i: Int[Array, ""]) -> Float[Array, "b h w c"]:
        scale = guidance.scale_at(i, steps)
        scales = [scale * factor for factor in factors]
        controls = {"cap": guidance.cap, "adain": guidance.adain}
        return guided_output(
            unet, found, weights, x, t, scales, control, parallel=parallel, **controls
        )

    return model


def initial_noise(
    seeds: Int[Array, " b"], height: int, width: int, channels: int
) -> Float[Array, "b h w c"]:
    """Unit noise, one picture a seed, the same whatever else is in the batch."""
    draw = jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), (height, width, channels)))
    return draw(seeds)
