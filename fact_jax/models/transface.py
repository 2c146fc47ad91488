"""TransFace, the face-recognition ViT whose tokens are FACT's identity (ICCV 2023, 2308.10133).

Its 12 x 12 tokens after the last LayerNorm condition the adapter; the global head gives the
embedding that compares identities and that ArcFace trains.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fact_jax.models.layers import Identity, check_diffusers_config, layer_norm, merge_heads
from fact_jax.ops.attention import attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransFaceConfig:
    """Shape of a TransFace ViT, with the released code's names."""

    img_size: int = 112
    patch_size: int = 9
    embed_dim: int = 512
    depth: int = 12
    num_heads: int = 8
    num_classes: int = 512

    @classmethod
    def vit_t(cls) -> "TransFaceConfig":
        return cls(embed_dim=256)

    @classmethod
    def vit_s(cls) -> "TransFaceConfig":
        return cls()

    @classmethod
    def vit_l(cls) -> "TransFaceConfig":
        return cls(embed_dim=768, depth=24)

    @classmethod
    def mini(cls) -> "TransFaceConfig":
        """The miniature: 48 x 48 crops, 6 x 6 tokens."""
        return cls(img_size=48, patch_size=8, embed_dim=128, depth=4, num_heads=4, num_classes=128)

    @property
    def tokens(self) -> int:
        """Number of tokens: patches that fit without padding."""
        return (self.img_size // self.patch_size) ** 2

    @classmethod
    def from_dict(cls, config: Mapping) -> "TransFaceConfig":
        """Read the released constructor's arguments; training-only ones are ignored."""
        check_diffusers_config(
            "transface",
            config,
            {
                "norm_layer": ("ln",),
                "qkv_bias": (False,),
                "mlp_ratio": (4, 4.0),
                "in_channels": (3,),
            },
        )
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in names if name in config})

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)


class SelfAttention(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.qkv = nnx.Linear(dim, 3 * dim, use_bias=False, rngs=rngs)
        self.proj = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        b, n, d = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads), 2, 0)
        return self.proj(merge_heads(attention(q, k, v)))


class MLP(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(dim, 4 * dim, rngs=rngs)
        self.fc2 = nnx.Linear(4 * dim, dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return self.fc2(jax.nn.relu6(self.fc1(x)))


class Block(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs=rngs)
        self.attn = SelfAttention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs=rngs)
        self.mlp = MLP(dim, rngs=rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nnx.Module):
    def __init__(self, patch: int, dim: int, *, rngs: nnx.Rngs):
        self.proj = nnx.Conv(
            3, dim, (patch, patch), strides=(patch, patch), padding="VALID", rngs=rngs
        )

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        x = self.proj(images)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class TransFace(nnx.Module):
    """Aligned face crops to tokens and an embedding.

    ``model.train()`` makes the head's batch normalisation use and record the batch's statistics.
    """

    def __init__(self, config: TransFaceConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim, tokens, classes = config.embed_dim, config.tokens, config.num_classes
        self.patch_embed = PatchEmbed(config.patch_size, dim, rngs=rngs)
        self.pos_embed = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, dim)))
        # Fills masked tokens when the encoder itself is trained; unused in the forward pass.
        self.mask_token = nnx.Param(jnp.zeros((1, 1, dim)))
        self.blocks = nnx.List(
            [Block(dim, config.num_heads, rngs=rngs) for _ in range(config.depth)]
        )
        self.norm = layer_norm(dim, rngs=rngs)
        self.senet = nnx.List(
            [
                nnx.Linear(tokens * dim, tokens, use_bias=False, rngs=rngs),
                Identity(),
                nnx.Linear(tokens, tokens, use_bias=False, rngs=rngs),
            ]
        )
        self.feature = nnx.List(
            [
                nnx.Linear(tokens * dim, dim, use_bias=False, rngs=rngs),
                _batch_norm(dim, rngs),
                nnx.Linear(dim, classes, use_bias=False, rngs=rngs),
                _batch_norm(classes, rngs),
            ]
        )

    def tokens(
        self, images: Float[Array, "b h w c"], blocks: tuple[int, ...] = ()
    ) -> Float[Array, "b n d"]:
        """The face tokens of crops in [-1, 1]: what FACT's adapter is conditioned on.

        Those of the named ``blocks`` (from 0), under the last LayerNorm too, come before them.
        """
        x, found = self.patch_embed(images) + self.pos_embed[...], []
        for number, block in enumerate(self.blocks):
            x = block(x)
            found += [self.norm(x)] * blocks.count(number)
        return jnp.concatenate([*found, self.norm(x)], axis=1) if found else self.norm(x)

    def embed(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b k"]:
        """The identity embedding (not normalised) of tokens weighted by their importance."""
        flat = tokens.reshape(tokens.shape[0], -1)
        weights = jax.nn.sigmoid(self.senet[2](jax.nn.relu(self.senet[0](flat))))
        x = (tokens * weights[:, :, None]).reshape(flat.shape)
        for layer in self.feature:
            x = layer(x)
        return x

    def __call__(
        self, images: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b k"]]:
        """Tokens and embedding of aligned RGB crops in [-1, 1] (height = width = img_size)."""
        tokens = self.tokens(images)
        return tokens, self.embed(tokens)


def _batch_norm(dim: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(
        dim,
        use_running_average=True,
        momentum=0.9,
        epsilon=2e-5,
        use_fast_variance=False,
        rngs=rngs,
    )
