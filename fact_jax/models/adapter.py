"""The face adapter: gated self-attention over visual and face tokens (FACT, arXiv 2410.12312).

It is a step of its own in a transformer block, between self-attention and text cross-attention,
after GLIGEN's gated layer (arXiv 2301.07093). Names are those of the released checkpoint.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from fact_jax.models.layers import Attention, FeedForward, Linear, layer_norm
from fact_jax.ops.attention_kernels import HiddenKeys

FaceKeys = tuple[Float[Array, "b m c"], Float[Array, "b m c"]]
"""Keys and values of the face tokens in one block; they depend on neither latents nor time."""
Scale = float | Float[Array, ""] | Float[Array, " b"]
"""The adapter's strength: one for all samples, or one a sample."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaceControls:
    """Variations of the adapter's formula; the defaults change nothing.

    ``cap``: the increment is shrunk where it is longer than ``cap`` times the tokens it is added
    to (after UniID). ``adain``: face keys and values are moved to the mean of the visual tokens'
    (Infinite-ID's AdaIN-mean). ``regions``: whose region each visual token lies in, by the number
    of tokens, see ``fact_jax.regions``; the face tokens are then those of ``k`` people, an equal
    share each, and a visual token sees only those of its people. Where there are none, the
    adapter adds nothing. ``token_mask``: which face tokens there are; the others, which fill their
    number up, are seen by nobody. ``cap`` (infinity: none) and ``adain`` may be traced.

    ``parallel`` is another way to add a face, for comparisons: visual tokens ask the face tokens
    alone, without feed-forward, and what comes of it is added beside text cross-attention, which
    does not see it (as IP-Adapter's decoupled cross-attention, arXiv 2308.06721; its queries are
    the text's, here they are the adapter's own).
    """

    cap: float | Float[Array, ""] | None = None
    adain: bool | Bool[Array, ""] = False
    regions: Mapping[int, Bool[Array, "b k _"]] | None = None
    token_mask: Bool[Array, " m"] | None = None
    parallel: bool = False


class FaceAdapter(nnx.Module):
    """One block's adapter. With both gates at 0 (as created here) it adds exactly nothing."""

    def __init__(self, dim: int, heads: int, face_dim: int, *, rngs: nnx.Rngs):
        self.linear = Linear(face_dim, dim, rngs=rngs)
        self.norm1 = layer_norm(dim, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs=rngs)
        self.attn = Attention(dim, heads, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)
        self.alpha_attn = nnx.Param(jnp.zeros(()))
        self.alpha_dense = nnx.Param(jnp.zeros(()))

    def keys(self, face: Float[Array, "b m f"]) -> FaceKeys:
        """Project face tokens to this block's keys and values, once a generation."""
        return self.attn.keys_values(self.norm1(self.linear(face)))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        face: FaceKeys,
        scale: Scale = 1.0,
        controls: FaceControls = FaceControls(),
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Return the adapted tokens and the increment that was added to ``x``.

        Only the N visual tokens ask queries: the face tokens' own rows would be thrown away.
        """
        regions = None if controls.regions is None else controls.regions[x.shape[1]]
        scale = jnp.asarray(scale, jnp.float32)
        scale = scale[:, None, None] if scale.ndim else scale
        visual = self.norm1(x)
        own = self.attn.keys_values(visual)
        if controls.adain is not False:
            people = 1 if regions is None else regions.shape[1]
            face = tuple(
                jnp.where(controls.adain, _moved(a, to, people, controls.token_mask), a)
                for a, to in zip(face, own, strict=True)
            )
        seen = 0 if controls.parallel else x.shape[1]
        keys, values = (
            jnp.concatenate([a[:, :seen], added.astype(a.dtype)], axis=1)
            for a, added in zip(own, face, strict=True)
        )
        unseen = _hidden_keys(regions, controls.token_mask, seen, face[0].shape[1])
        mixed = self.attn.attend(visual, keys, values, unseen)
        first = _gated(scale, self.alpha_attn[...], mixed)
        hidden = x + first
        second = _gated(scale, self.alpha_dense[...], self.ff(self.norm2(hidden)))
        if controls.parallel:
            second = jnp.zeros_like(first)
        if regions is None and controls.cap is None:
            return hidden + second, first + second
        increment = first + second
        if regions is not None:
            increment = jnp.where(regions.any(axis=1)[..., None], increment, 0)
        if controls.cap is not None:
            increment = _capped(increment, x, controls.cap)
        return x + increment, increment


def _gated(
    scale: Float[Array, "..."], alpha: Float[Array, ""], increment: Float[Array, "b n c"]
) -> Float[Array, "b n c"]:
    """In float32, and with it the sum over all numbers that is the gradient of ``alpha``."""
    gate = scale * jnp.tanh(alpha.astype(jnp.float32))
    return (gate * increment.astype(jnp.float32)).astype(increment.dtype)


def _moved(
    face: Float[Array, "b m c"],
    to: Float[Array, "b n c"],
    people: int,
    token_mask: Bool[Array, " m"] | None,
) -> Float[Array, "b m c"]:
    """Each person's tokens, their mean replaced by that of ``to`` (arXiv 2403.11781)."""
    b, m, c = face.shape
    own = face.reshape(b, people, m // people, c)
    there = None if token_mask is None else token_mask.reshape(people, -1, 1)
    mean = to.mean(axis=1)[:, None, None].astype(face.dtype)
    return (own - own.mean(axis=2, keepdims=True, where=there) + mean).reshape(b, m, c)


def _hidden_keys(
    regions: Bool[Array, "b k n"] | None, token_mask: Bool[Array, " m"] | None, n: int, tokens: int
) -> HiddenKeys | None:
    """Which of the ``tokens`` face tokens that follow ``n`` visual ones are hidden from which."""
    hidden = None
    if token_mask is not None:
        hidden = HiddenKeys(jnp.ones((1, 1, 1), bool), _after_visual(~token_mask[:, None], n))
    if regions is not None:
        people = regions.shape[1]
        owned = jnp.repeat(jnp.eye(people, dtype=bool), tokens // people, axis=0)
        others = HiddenKeys(~regions.swapaxes(1, 2), _after_visual(owned, n))
        hidden = others if hidden is None else others.joined(hidden)
    return hidden


def _after_visual(faces: Bool[Array, "m g"], n: int) -> Bool[Array, "1 keys g"]:
    return jnp.pad(faces[None], ((0, 0), (n, 0), (0, 0)))


def _capped(
    increment: Float[Array, "b n c"], x: Float[Array, "b n c"], cap: float | Float[Array, ""]
) -> Float[Array, "b n c"]:
    """``increment`` times min(1, cap |x| / |increment|), norms of a whole sample in float32."""
    length, limit = (
        jnp.sqrt(jnp.square(a.astype(jnp.float32)).sum((1, 2), keepdims=True))
        for a in (increment, x)
    )
    limit = cap * limit
    factor = jnp.where(length > limit, limit / jnp.where(length > 0, length, 1), 1)
    return increment * factor.astype(increment.dtype)
