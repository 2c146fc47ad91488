"""The face adapter: gated self-attention over visual and face tokens (FACT, arXiv 2410.12312).

It is a step of its own in a transformer block, between self-attention and text cross-attention,
after GLIGEN's gated layer (arXiv 2301.07093). Names are those of the released checkpoint.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fact_jax.models.layers import Attention, FeedForward, layer_norm

FaceKeys = tuple[Float[Array, "b m c"], Float[Array, "b m c"]]
"""Keys and values of the face tokens in one block; they depend on neither latents nor time."""
Scale = float | Float[Array, ""] | Float[Array, " b"]
"""The adapter's strength: one for all samples, or one a sample."""


class FaceAdapter(nnx.Module):
    """One block's adapter. With both gates at 0 (as created here) it adds exactly nothing."""

    def __init__(self, dim: int, heads: int, face_dim: int, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(face_dim, dim, rngs=rngs)
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
        self, x: Float[Array, "b n c"], face: FaceKeys, scale: Scale = 1.0
    ) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"]]:
        """Return the adapted tokens and the increment that was added to ``x``.

        Only the N visual tokens ask queries: the face tokens' own rows would be thrown away.
        """
        scale = jnp.asarray(scale, x.dtype)
        scale = scale[:, None, None] if scale.ndim else scale
        visual = self.norm1(x)
        keys, values = (
            jnp.concatenate([own, added.astype(own.dtype)], axis=1)
            for own, added in zip(self.attn.keys_values(visual), face, strict=True)
        )
        mixed = self.attn.attend(visual, keys, values)
        first = scale * jnp.tanh(self.alpha_attn[...]).astype(x.dtype) * mixed
        hidden = x + first
        second = (
            scale * jnp.tanh(self.alpha_dense[...]).astype(x.dtype) * self.ff(self.norm2(hidden))
        )
        return hidden + second, first + second
