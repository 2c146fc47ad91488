"""CLIP's text transformer (Radford et al. 2021, arXiv 2103.00020), names as in transformers."""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from fact_jax.models.layers import layer_norm, merge_heads, split_heads
from fact_jax.utils.errors import UserError


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The sigmoid approximation of GELU that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


# Where transformers' defaults are not those of ViT-L/14.
_PEER_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """Shape of a CLIP text model (transformers' names); defaults are ViT-L/14's, as in SD 1.5."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 1

    @classmethod
    def sd15(cls) -> "CLIPTextConfig":
        return cls()

    @classmethod
    def mini(cls, vocab_size: int) -> "CLIPTextConfig":
        """The miniature; the vocabulary ends with its start and end tokens."""
        return cls(
            vocab_size=vocab_size,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=vocab_size - 1,
        )

    @classmethod
    def from_dict(cls, config: Mapping) -> "CLIPTextConfig":
        """Read transformers' ``text_encoder/config.json``; what it lacks is transformers' own."""
        names = [field.name for field in dataclasses.fields(cls)]
        said = {name: config[name] for name in names if config.get(name) is not None}
        own = cls(**(_PEER_DEFAULTS | said))
        if own.hidden_act not in _ACTIVATIONS:
            raise UserError(
                f"clip_text configuration not supported: hidden_act={own.hidden_act!r} "
                f"(supported: {', '.join(_ACTIVATIONS)})"
            )
        return own

    def to_dict(self) -> dict:
        """Write transformers' ``text_encoder/config.json``."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "projection_dim": self.hidden_size,
            **dataclasses.asdict(self),
        }


class CausalSelfAttention(nnx.Module):
    """Multi-head attention in which a token sees itself and the tokens before it."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.q_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.k_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.v_proj = nnx.Linear(dim, dim, rngs=rngs)
        self.out_proj = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        q, k, v = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = q * q.shape[-1] ** -0.5
        scores = jnp.einsum("bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32)
        visible = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1).astype(v.dtype)
        return self.out_proj(merge_heads(jnp.einsum("bhnm,bmhd->bnhd", weights, v)))


class MLP(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class EncoderLayer(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = layer_norm(dim, eps, rngs=rngs)
        self.self_attn = CausalSelfAttention(dim, config.num_attention_heads, rngs=rngs)
        self.layer_norm2 = layer_norm(dim, eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        # CLIP's own initial scales; with larger ones a small text model learns slowly.
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(
            config.max_position_embeddings,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(0.01),
            rngs=rngs,
        )

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        positions = jnp.arange(input_ids.shape[1])
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        # An Embed gives the dtype that it was made with, not that of its parameters.
        return x.astype(self.token_embedding.embedding[...].dtype)


class Layers(nnx.Module):
    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [EncoderLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )


class CLIPTextModel(nnx.Module):
    """Token ids to final hidden states after the final LayerNorm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Layers(config, rngs=rngs)
        self.final_layer_norm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)

    def __call__(self, input_ids: Int[Array, "b n"]) -> Float[Array, "b n d"]:
        """``input_ids`` has at most ``max_position_embeddings`` columns."""
        x = self.embeddings(input_ids)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.final_layer_norm(x)
