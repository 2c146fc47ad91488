"""The Stable Diffusion 1.5 family of UNets, with an optional face adapter in every block.

Attribute names follow diffusers' ``UNet2DConditionModel``; the adapter, which the released code
hides in ``attn2.processor``, is the attribute ``face`` of the transformer block. Face tokens and
their scale are arguments of the call.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from fact_jax.errors import UserError
from fact_jax.models.adapter import FaceAdapter, FaceKeys, Scale
from fact_jax.models.layers import (
    Attention,
    Downsample,
    FeedForward,
    ResnetBlock,
    Upsample,
    check_peer_config,
    conv,
    group_norm,
    layer_norm,
    timestep_embedding,
)
from fact_jax.models.remat import Remat, call_block

AllFaceKeys = tuple[tuple[Float[Array, "b m _"], Float[Array, "b m _"]], ...]
"""The adapters' keys and values in call order; each block has a width of its own."""
OnIncrement = Callable[[Float[Array, "b n c"], Float[Array, "b n c"], tuple[int, int]], Any]

_SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1, 1.0),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}
_DOWN = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of a UNet; ``face_dim`` is the width of face tokens, or None for a UNet without them.

    ``heads`` holds the attention heads of each level (diffusers calls it ``attention_head_dim``).
    """

    sample_size: int = 64
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    heads: tuple[int, ...] = (8, 8, 8, 8)
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False
    face_dim: int | None = None

    @classmethod
    def sd15(cls, *, face_dim: int | None = None) -> "UNetConfig":
        return cls(face_dim=face_dim)

    @classmethod
    def mini(cls, *, face_dim: int | None = None) -> "UNetConfig":
        """The miniature: 8 x 8 x 16 latents, two levels, seven transformer blocks."""
        return cls(
            sample_size=8,
            in_channels=16,
            out_channels=16,
            block_out_channels=(64, 128),
            down_attention=(True, True),
            up_attention=(True, True),
            layers_per_block=1,
            cross_attention_dim=64,
            heads=(2, 4),
            norm_num_groups=16,
            face_dim=face_dim,
        )

    @classmethod
    def from_dict(cls, config: Mapping, *, face_dim: int | None = None) -> "UNetConfig":
        """Read diffusers' ``unet/config.json``.

        Raises ``UserError`` for a configuration whose forward pass differs from this model's.
        """
        check_peer_config("unet", config, _SUPPORTED)
        own = cls(
            face_dim=face_dim,
            down_attention=_attention_flags(config, "down_block_types", _DOWN, cls.down_attention),
            up_attention=_attention_flags(config, "up_block_types", _UP, cls.up_attention),
            **{
                key: tuple(config[key]) if isinstance(config[key], list | tuple) else config[key]
                for key in _SHARED_KEYS
                if key in config
            },
        )
        levels = len(own.block_out_channels)
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
        heads = (heads,) * levels if isinstance(heads, int) else tuple(heads)
        if not (len(heads) == len(own.down_attention) == len(own.up_attention) == levels):
            raise UserError(
                f"unet configuration: block_out_channels has {levels} levels, but the block types "
                f"or attention_head_dim have another number"
            )
        return dataclasses.replace(own, heads=heads)

    def to_dict(self) -> dict:
        """Write diffusers' ``unet/config.json``."""
        return {
            "_class_name": "UNet2DConditionModel",
            "down_block_types": [_name(_DOWN, flag) for flag in self.down_attention],
            "up_block_types": [_name(_UP, flag) for flag in self.up_attention],
            "attention_head_dim": list(self.heads) if len(set(self.heads)) > 1 else self.heads[0],
            **{
                key: list(value) if isinstance(value := getattr(self, key), tuple) else value
                for key in _SHARED_KEYS
            },
        }


_OWN_KEYS = ("down_attention", "up_attention", "heads", "face_dim")
_SHARED_KEYS = [f.name for f in dataclasses.fields(UNetConfig) if f.name not in _OWN_KEYS]


def _attention_flags(config: Mapping, key: str, names: dict, default: tuple) -> tuple[bool, ...]:
    if key not in config:
        return default
    unknown = [name for name in config[key] if name not in names]
    if unknown:
        raise UserError(f"unet configuration: {key} has {unknown[0]!r}; known: {', '.join(names)}")
    return tuple(names[name] for name in config[key])


def _name(names: dict[str, bool], flag: bool) -> str:
    return next(name for name, value in names.items() if value == flag)


class _Pass:
    """One pass through the UNet: what its blocks are given, and what the adapters give back."""

    def __init__(
        self,
        time: Float[Array, "b t"],
        text: Float[Array, "b n d"],
        keys: AllFaceKeys | None,
        scale: Scale,
        on_increment: OnIncrement | None,
        remat: Remat,
    ):
        self.time, self.text, self.scale, self.remat = time, text, scale, remat
        self.keys: Iterator[FaceKeys] | None = None if keys is None else iter(keys)
        self.on_increment = on_increment
        self.results: list = []

    def layer(self, block: "Block", index: int, x: Float[Array, "b h w c"]):
        """The residual block of this index, and its transformer if there are any."""
        x = call_block(self.remat, block.resnets[index], x, self.time)
        if not len(block.attentions) or index == len(block.attentions):
            return x
        face = None if self.keys is None else next(self.keys)
        arrays = (x, self.text, face, self.scale)
        x, result = call_block(
            self.remat, block.attentions[index], *arrays, on_increment=self.on_increment
        )
        if face is not None and self.on_increment is not None:
            self.results.append(result)
        return x


class TransformerBlock(nnx.Module):
    """Self-attention, face adapter, text cross-attention, feed-forward."""

    def __init__(self, dim: int, heads: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(dim, rngs=rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = layer_norm(dim, rngs=rngs)
        self.attn2 = Attention(dim, heads, config.cross_attention_dim, rngs=rngs)
        self.norm3 = layer_norm(dim, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)
        face_dim = config.face_dim
        self.face = FaceAdapter(dim, heads, face_dim, rngs=rngs) if face_dim else None

    def __call__(
        self,
        x: Float[Array, "b n c"],
        text: Float[Array, "b k d"],
        face: FaceKeys | None,
        scale: Scale,
        on_increment: OnIncrement | None,
        size: tuple[int, int],
    ) -> tuple[Float[Array, "b n c"], Any]:
        """The tokens, and what ``on_increment`` made of the adapter's increment."""
        x, result = x + self.attn1(self.norm1(x)), None
        if face is not None:
            adapted, increment = self.face(x, face, scale)
            if on_increment is not None:
                result = on_increment(x, increment, size)
            x = adapted
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x)), result


class SpatialTransformer(nnx.Module):
    """diffusers' ``Transformer2DModel``: pixels to tokens, one block, and back."""

    def __init__(self, dim: int, heads: int, config: UNetConfig, *, rngs: nnx.Rngs):
        self.norm = group_norm(dim, config.norm_num_groups, 1e-6, rngs=rngs)
        linear = config.use_linear_projection
        make = nnx.Linear if linear else (lambda i, o, *, rngs: conv(i, o, 1, rngs=rngs))
        self.proj_in = make(dim, dim, rngs=rngs)
        self.transformer_blocks = nnx.List([TransformerBlock(dim, heads, config, rngs=rngs)])
        self.proj_out = make(dim, dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "b n d"],
        face: FaceKeys | None,
        scale: Scale,
        on_increment: OnIncrement | None,
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """The features, and what ``on_increment`` made of the adapter's increment."""
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        (block,) = self.transformer_blocks
        tokens, result = block(tokens, text, face, scale, on_increment, (h, w))
        return x + self.proj_out(tokens.reshape(b, h, w, c)), result


class Block(nnx.Module):
    """One level of the UNet: residual blocks, transformers if any, and a resampler if any."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        config: UNetConfig,
        *,
        transformers: int,
        heads: int,
        resample: Literal["down", "up"] | None = None,
        rngs: nnx.Rngs,
    ):
        time_dim = 4 * config.block_out_channels[0]
        groups, eps = config.norm_num_groups, config.norm_eps
        self.resnets = nnx.List(
            [
                ResnetBlock(i, o, groups=groups, eps=eps, time_dim=time_dim, rngs=rngs)
                for i, o in widths
            ]
        )
        width = widths[-1][1]
        self.attentions = nnx.List(
            [SpatialTransformer(width, heads, config, rngs=rngs) for _ in range(transformers)]
        )
        down, up = resample == "down", resample == "up"
        self.downsamplers = nnx.List([Downsample(width, (1, 1), rngs=rngs)] if down else [])
        self.upsamplers = nnx.List([Upsample(width, rngs=rngs)] if up else [])


class TimeEmbedding(nnx.Module):
    """Two linear layers with SiLU between."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(inputs, outputs, rngs=rngs)
        self.linear_2 = nnx.Linear(outputs, outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b t"]:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class UNet(nnx.Module):
    """UNet2DConditionModel of Stable Diffusion 1.5, of any width, with or without adapters."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs=rngs)
        self.down_blocks = nnx.List(_down_blocks(config, rngs))
        self.mid_block = Block(
            [(widths[-1], widths[-1])] * 2,
            config,
            transformers=1,
            heads=config.heads[-1],
            rngs=rngs,
        )
        self.up_blocks = nnx.List(_up_blocks(config, rngs))
        self.conv_norm_out = group_norm(widths[0], groups, config.norm_eps, rngs=rngs)
        self.conv_out = conv(widths[0], config.out_channels, rngs=rngs)

    def transformer_blocks(self) -> Iterator[tuple[str, TransformerBlock]]:
        """Every transformer block with its path, in the order of the forward pass."""
        named = [(f"down_blocks.{i}", block) for i, block in enumerate(self.down_blocks)]
        named += [("mid_block", self.mid_block)]
        named += [(f"up_blocks.{i}", block) for i, block in enumerate(self.up_blocks)]
        for path, block in named:
            for j, transformer in enumerate(block.attentions):
                for k, inner in enumerate(transformer.transformer_blocks):
                    yield f"{path}.attentions.{j}.transformer_blocks.{k}", inner

    def face_keys(self, face: Float[Array, "b m f"]) -> AllFaceKeys:
        """Keys and values of the face tokens in every adapted block, in call order.

        Pass the result as ``face`` to the calls of a whole generation.
        """
        if self.config.face_dim is None:
            raise UserError("this UNet has no face adapter: load one before passing face tokens")
        return tuple(block.face.keys(face) for _, block in self.transformer_blocks())

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, ""] | Real[Array, " b"],
        text: Float[Array, "b n d"],
        face: Float[Array, "b m f"] | AllFaceKeys | None = None,
        face_scale: Scale = 1.0,
        on_increment: OnIncrement | None = None,
        remat: Remat = "none",
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], tuple]:
        """Predict the noise (or velocity) in ``latents`` (height and width of any size).

        ``timesteps`` are whole or fractional, one for all samples or one a sample.
        ``face`` are face tokens or the result of :meth:`face_keys`; None leaves the adapters out.
        ``face_scale`` is a number or one a sample. With ``on_increment(x, delta, (h, w))``, called
        in every adapted block with its input and the increment it adds, the results come back as
        a tuple beside the prediction: FAIR is computed so without a second pass. ``remat`` applies
        to each residual and each transformer block.
        """
        keys = face if face is None or isinstance(face, tuple) else self.face_keys(face)
        timesteps = jnp.broadcast_to(jnp.atleast_1d(timesteps), latents.shape[:1])
        time = timestep_embedding(timesteps, self.config.block_out_channels[0])
        time = self.time_embedding(time.astype(latents.dtype))

        run = _Pass(time, text, keys, face_scale, on_increment, remat)

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            for j in range(len(block.resnets)):
                x = run.layer(block, j, x)
                skips.append(x)
            for sampler in block.downsamplers:
                x = sampler(x)
                skips.append(x)

        # The middle has a transformer less than it has residual blocks.
        x = run.layer(self.mid_block, 1, run.layer(self.mid_block, 0, x))

        for block in self.up_blocks:
            for j in range(len(block.resnets)):
                x = run.layer(block, j, jnp.concatenate([x, skips.pop()], axis=-1))
            for sampler in block.upsamplers:
                x = sampler(x, skips[-1].shape[1:3])

        out = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return out if on_increment is None else (out, tuple(run.results))


def _down_blocks(config: UNetConfig, rngs: nnx.Rngs) -> list[Block]:
    blocks, previous = [], config.block_out_channels[0]
    for level, width in enumerate(config.block_out_channels):
        widths = [(previous if j == 0 else width, width) for j in range(config.layers_per_block)]
        last = level == len(config.block_out_channels) - 1
        blocks.append(
            Block(
                widths,
                config,
                transformers=len(widths) * config.down_attention[level],
                heads=config.heads[level],
                resample=None if last else "down",
                rngs=rngs,
            )
        )
        previous = width
    return blocks


def _up_blocks(config: UNetConfig, rngs: nnx.Rngs) -> list[Block]:
    blocks = []
    outputs = config.block_out_channels[::-1]
    for level, width in enumerate(outputs):
        below = outputs[max(level - 1, 0)]  # what comes up from the level before
        beside = outputs[min(level + 1, len(outputs) - 1)]  # the narrowest of the skips
        layers = config.layers_per_block + 1
        widths = [
            ((below if j == 0 else width) + (beside if j == layers - 1 else width), width)
            for j in range(layers)
        ]
        last = level == len(outputs) - 1
        blocks.append(
            Block(
                widths,
                config,
                transformers=layers * config.up_attention[level],
                heads=config.heads[::-1][level],
                resample=None if last else "up",
                rngs=rngs,
            )
        )
    return blocks
