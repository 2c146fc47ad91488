"""FACT's face projection: an attention-query resampler from face tokens to 16 conditions.

A Perceiver resampler (Flamingo, arXiv 2204.14198; as IP-Adapter Plus has it), with the released
checkpoint's names under ``local_fac_prj``.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fact_jax.models.layers import (
    Identity,
    Linear,
    check_diffusers_config,
    layer_norm,
    merge_heads,
    split_heads,
)
from fact_jax.ops.attention import attention
from fact_jax.utils.ranges import CheckedFields, Count, CountOrZero

VARIATIONS = {"encoder_blocks": (), "embedding": False, "input_tokens": None}
"""Settings that only adapters of comparisons have, as FACT's has them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResamplerConfig(CheckedFields):
    """Shape of the resampler, with the released code's names.

    The last three are variations for comparisons. ``encoder_blocks`` (from 0): the tokens of these
    blocks of the encoder come before those of its last (DreamIdentity's features of several
    scales, arXiv 2307.00300). ``embedding``: the encoder's embedding comes, as the only token.
    ``input_tokens``: in the resampler's place a linear map of so many tokens to ``num_queries``, as
    FACT's pre-release had it; ``dim``, ``depth`` and heads then say nothing.
    """

    dim: Count = 1024
    depth: Count = 4
    dim_head: Count = 64
    heads: Count = 12
    num_queries: Count = 16
    embedding_dim: Count = 512
    output_dim: Count = 768
    encoder_blocks: tuple[CountOrZero, ...] = ()
    embedding: bool = False
    input_tokens: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding and self.encoder_blocks:
            raise ValueError("embedding is one vector: it cannot be had with encoder_blocks")

    @property
    def variation(self) -> str | None:
        """How it is another than FACT's, in words; None: it is FACT's."""
        if self.embedding:
            return "an adapter that takes the encoder's embedding"
        if self.encoder_blocks:
            return "an adapter that takes tokens of several encoder blocks"
        return None if self.input_tokens is None else "an adapter with a linear projection"

    @classmethod
    def sd15(cls) -> "ResamplerConfig":
        return cls()

    @classmethod
    def mini(cls) -> "ResamplerConfig":
        """The miniature: tokens of the mini TransFace to 16 conditions for the mini UNet."""
        return cls(dim=128, depth=2, dim_head=32, heads=4, embedding_dim=128, output_dim=64)

    @classmethod
    def from_dict(cls, config: Mapping) -> "ResamplerConfig":
        check_diffusers_config("resampler", config, {"ff_mult": (4,)})
        names = [field.name for field in dataclasses.fields(cls)]
        found = {name: config[name] for name in names if name in config}
        if isinstance(found.get("encoder_blocks"), list):  # as JSON has it
            found["encoder_blocks"] = tuple(found["encoder_blocks"])
        return cls(**found)

    def to_dict(self) -> dict:
        """As files hold it: variations only where there are any."""
        return {k: v for k, v in dataclasses.asdict(self).items() if VARIATIONS.get(k, ...) != v}


class PerceiverAttention(nnx.Module):
    """Latents attend to tokens and to themselves."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        inner = config.dim_head * config.heads
        self.heads = config.heads
        self.norm1 = layer_norm(config.dim, rngs=rngs)
        self.norm2 = layer_norm(config.dim, rngs=rngs)
        self.to_q = Linear(config.dim, inner, use_bias=False, rngs=rngs)
        self.to_kv = Linear(config.dim, 2 * inner, use_bias=False, rngs=rngs)
        self.to_out = Linear(inner, config.dim, use_bias=False, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "b n d"], latents: Float[Array, "b m d"]
    ) -> Float[Array, "b m d"]:
        tokens, latents = self.norm1(tokens), self.norm2(latents)
        keys, values = jnp.split(self.to_kv(jnp.concatenate([tokens, latents], axis=1)), 2, axis=-1)
        q, k, v = (split_heads(a, self.heads) for a in (self.to_q(latents), keys, values))
        return self.to_out(merge_heads(attention(q, k, v)))


class Gelu(Identity):
    """Exact (erf) GELU in its place of the list."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return jax.nn.gelu(x, approximate=False)


class Resampler(nnx.Module):
    """TransFace tokens of one photo to ``num_queries`` face tokens."""

    def __init__(self, config: ResamplerConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim = config.dim
        if config.input_tokens is not None:
            self.proj_in = Linear(config.embedding_dim, config.output_dim, rngs=rngs)
            self.over_tokens = Linear(config.input_tokens, config.num_queries, rngs=rngs)
            return
        self.latents = nnx.Param(
            jax.random.normal(rngs.params(), (1, config.num_queries, dim)) / dim**0.5
        )
        self.proj_in = Linear(config.embedding_dim, dim, rngs=rngs)
        self.layers = nnx.List([_layer(config, rngs) for _ in range(config.depth)])
        self.proj_out = Linear(dim, config.output_dim, rngs=rngs)
        self.norm_out = layer_norm(config.output_dim, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b n e"]) -> Float[Array, "b m o"]:
        """Face tokens. All-zero ``tokens`` give the null condition ('no face')."""
        x = self.proj_in(tokens)
        if self.config.input_tokens is not None:
            return self.over_tokens(x.swapaxes(1, 2)).swapaxes(1, 2)
        latents = jnp.broadcast_to(
            self.latents[...].astype(x.dtype), (x.shape[0], *self.latents.shape[1:])
        )
        for attend, feed_forward in self.layers:
            latents = latents + attend(x, latents)
            hidden = latents
            for layer in feed_forward:
                hidden = layer(hidden)
            latents = latents + hidden
        return self.norm_out(self.proj_out(latents))


def _layer(config: ResamplerConfig, rngs: nnx.Rngs) -> nnx.List:
    dim = config.dim
    feed_forward = nnx.List(
        [
            layer_norm(dim, rngs=rngs),
            Linear(dim, 4 * dim, use_bias=False, rngs=rngs),
            Gelu(),
            Linear(4 * dim, dim, use_bias=False, rngs=rngs),
        ]
    )
    return nnx.List([PerceiverAttention(config, rngs=rngs), feed_forward])
