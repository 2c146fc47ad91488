"""Blocks and configuration of the UNet encoder, which the UNet and ControlNets share.

Attribute names follow diffusers; the adapter, which the released code hides in
``attn2.processor``, is the attribute ``face`` of the transformer block.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Real

from fact_jax.models.adapter import FaceAdapter, FaceControls, FaceKeys, Scale
from fact_jax.models.layers import (
    Attention,
    Downsample,
    FeedForward,
    Linear,
    ResnetBlock,
    Upsample,
    check_diffusers_config,
    conv,
    group_norm,
    layer_norm,
    timestep_embedding,
)
from fact_jax.ops.remat import Remat, call_block
from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import CheckedFields, Count, Positive

AnyFaceKeys = tuple[Float[Array, "b m _"], Float[Array, "b m _"]]
AllFaceKeys = tuple[AnyFaceKeys, ...]
"""The adapters' keys and values in call order; each block has a width of its own."""
BlockFaces = tuple[tuple[AnyFaceKeys | None, Scale], ...]
"""Keys and values, and the adapter's strength, for each transformer of a block."""
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
_TYPES = {
    "down": {"CrossAttnDownBlock2D": True, "DownBlock2D": False},
    "up": {"CrossAttnUpBlock2D": True, "UpBlock2D": False},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetEncoderConfig(CheckedFields):
    """Shape of the encoder (the down blocks and the middle block).

    ``heads`` holds the attention heads of each level (diffusers calls it ``attention_head_dim``).
    """

    in_channels: Count = 4
    block_out_channels: tuple[Count, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    layers_per_block: Count = 2
    cross_attention_dim: Count = 768
    heads: tuple[Count, ...] = (8, 8, 8, 8)
    norm_num_groups: Count = 32
    norm_eps: Positive = 1e-5
    use_linear_projection: bool = False
    face_dim: ClassVar[int | None] = None

    @classmethod
    def parse_diffusers_config(cls, model: str, config: Mapping) -> dict[str, Any]:
        """Values of our fields from diffusers' ``config.json`` of this sort of ``model``.

        Raises ``UserError`` for a configuration whose forward pass differs from ours.
        """
        check_diffusers_config(model, config, _SUPPORTED)
        found: dict[str, Any] = {
            key: tuple(config[key]) if isinstance(config[key], list | tuple) else config[key]
            for key in cls._same_names()
            if config.get(key) is not None
        }
        sides = cls._sides()
        for side in sides:
            if (key := f"{side}_block_types") in config:
                found[f"{side}_attention"] = _attention_flags(model, key, config[key], _TYPES[side])
        levels = len(found.get("block_out_channels", cls.block_out_channels))
        heads = config.get("num_attention_heads") or config.get("attention_head_dim") or 8
        found["heads"] = (heads,) * levels if isinstance(heads, int) else tuple(heads)
        by_level = ["heads", *(f"{side}_attention" for side in sides)]
        if any(len(found.get(key, getattr(cls, key))) != levels for key in by_level):
            raise UserError(
                f"{model} configuration: block_out_channels has {levels} levels, but the block "
                f"types or attention_head_dim have another number"
            )
        return found

    def to_diffusers_config(self, class_name: str) -> dict[str, Any]:
        """The same as diffusers' ``config.json``."""
        return {
            "_class_name": class_name,
            **{
                f"{side}_block_types": [
                    next(name for name, value in _TYPES[side].items() if value == flag)
                    for flag in getattr(self, f"{side}_attention")
                ]
                for side in self._sides()
            },
            "attention_head_dim": list(self.heads) if len(set(self.heads)) > 1 else self.heads[0],
            **{
                key: list(value) if isinstance(value := getattr(self, key), tuple) else value
                for key in self._same_names()
            },
        }

    @classmethod
    def _sides(cls) -> list[str]:
        return [side for side in _TYPES if hasattr(cls, f"{side}_attention")]

    @classmethod
    def _same_names(cls) -> list[str]:
        own = ("down_attention", "up_attention", "heads", "face_dim")
        return [field.name for field in dataclasses.fields(cls) if field.name not in own]


def _attention_flags(model: str, key: str, types: Sequence, names: dict) -> tuple[bool, ...]:
    unknown = [name for name in types if name not in names]
    if unknown:
        raise UserError(
            f"{model} configuration: {key} has {unknown[0]!r}; known: {', '.join(names)}"
        )
    return tuple(names[name] for name in types)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardContext:
    """What every block of one forward pass is given beside the features."""

    time: Float[Array, "b t"]
    text: Float[Array, "b n d"]
    on_increment: OnIncrement | None = None
    remat: Remat | None = None
    controls: FaceControls
    text_attention: Bool[Array, ""] | Bool[Array, " b"] | None = None

    def layer(self, block: "Block", index: int, x: Float[Array, "b h w c"], faces: BlockFaces):
        """Residual block ``index`` and its transformer, if it has one.

        Gives the features, and a list of what ``on_increment`` returned (empty without a face).
        """
        x = call_block(self.remat, block.resnets[index], x, self.time)
        if index >= len(block.attentions):
            return x, []
        face, scale = faces[index]
        x, result = call_block(
            self.remat,
            block.attentions[index],
            *(x, self.text, face, scale, self.text_attention),
            on_increment=self.on_increment,
            controls=self.controls,
        )
        return x, [] if face is None else [result]

    def encode(
        self, blocks: Sequence["Block"], x: Float[Array, "b h w c"], faces: Sequence[BlockFaces]
    ):
        """The down blocks and the middle block (the last of ``blocks``).

        Gives the features, the skips (``x`` first), and the results of ``on_increment``.
        """
        skips, results = [x], []
        *down, middle = zip(blocks, faces, strict=True)
        for block, face in down:
            for j in range(len(block.resnets)):
                x, result = self.layer(block, j, x, face)
                skips.append(x)
                results += result
            for sampler in block.downsamplers:
                x = sampler(x)
                skips.append(x)
        block, face = middle
        for j in range(len(block.resnets)):
            x, result = self.layer(block, j, x, face)
            results += result
        return x, skips, results


def faces_by_block(
    blocks: Sequence["Block"], keys: AllFaceKeys | None, scale: Scale | tuple[Scale, ...]
) -> list[BlockFaces]:
    """The adapters' keys and strengths, given in call order, for the transformers of each block."""
    counts = [len(block.attentions) for block in blocks]
    pairs: list[tuple[AnyFaceKeys | None, Scale]] = [(None, 0.0)] * sum(counts)
    if keys is not None:
        scales = scale if isinstance(scale, tuple) else (scale,) * sum(counts)
        pairs = list(zip(keys, scales, strict=True))
    ends = itertools.accumulate(counts)
    return [tuple(pairs[end - count : end]) for count, end in zip(counts, ends, strict=True)]


class TransformerBlock(nnx.Module):
    """Self-attention, face adapter, text cross-attention, feed-forward."""

    def __init__(self, dim: int, heads: int, config: UNetEncoderConfig, *, rngs: nnx.Rngs):
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
        text_attention: Bool[Array, ""] | Bool[Array, " b"] | None,
        on_increment: OnIncrement | None,
        controls: FaceControls,
        size: tuple[int, int],
    ) -> tuple[Float[Array, "b n c"], Any]:
        """The tokens, and what ``on_increment`` made of the adapter's increment.

        Where ``text_attention`` is False, text cross-attention adds nothing.
        """
        x, result, beside = x + self.attn1(self.norm1(x)), None, None
        if face is not None:
            assert self.face is not None  # UNet.face_keys has refused it
            adapted, increment = self.face(x, face, scale, controls)
            if on_increment is not None:
                result = on_increment(x, increment, size)
            x, beside = (x, increment) if controls.parallel else (adapted, None)
        read = self.attn2(self.norm2(x), text)
        if text_attention is not None:
            read = jnp.where(text_attention.reshape(-1, 1, 1), read, 0)
        x = x + read if beside is None else x + read + beside
        return x + self.ff(self.norm3(x)), result


class SpatialTransformer(nnx.Module):
    """diffusers' ``Transformer2DModel``: pixels to tokens, one block, and back."""

    def __init__(self, dim: int, heads: int, config: UNetEncoderConfig, *, rngs: nnx.Rngs):
        self.norm = group_norm(dim, config.norm_num_groups, 1e-6, rngs=rngs)
        linear = config.use_linear_projection
        make = Linear if linear else (lambda i, o, *, rngs: conv(i, o, 1, rngs=rngs))
        self.proj_in = make(dim, dim, rngs=rngs)
        self.transformer_blocks = nnx.List([TransformerBlock(dim, heads, config, rngs=rngs)])
        self.proj_out = make(dim, dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: Float[Array, "b n d"],
        face: FaceKeys | None,
        scale: Scale,
        text_attention: Bool[Array, ""] | Bool[Array, " b"] | None,
        on_increment: OnIncrement | None,
        controls: FaceControls,
    ) -> tuple[Float[Array, "b h w c"], Any]:
        """The features, and what ``on_increment`` made of the adapter's increment."""
        b, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        (block,) = self.transformer_blocks
        tokens, result = block(
            tokens, text, face, scale, text_attention, on_increment, controls, (h, w)
        )
        return x + self.proj_out(tokens.reshape(b, h, w, c)), result


class Block(nnx.Module):
    """One level of the UNet: residual blocks, transformers if any, and a resampler if any."""

    def __init__(
        self,
        widths: list[tuple[int, int]],
        config: UNetEncoderConfig,
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


def down_blocks(config: UNetEncoderConfig, rngs: nnx.Rngs) -> nnx.List:
    """The down blocks, one for each level."""
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
    return nnx.List(blocks)


def mid_block(config: UNetEncoderConfig, rngs: nnx.Rngs) -> Block:
    """The middle block: two residual blocks around a transformer."""
    width = config.block_out_channels[-1]
    return Block([(width, width)] * 2, config, transformers=1, heads=config.heads[-1], rngs=rngs)


class TimeEmbedding(nnx.Module):
    """Sinusoids through two linear layers with SiLU between."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(inputs, outputs, rngs=rngs)
        self.linear_2 = Linear(outputs, outputs, rngs=rngs)

    def __call__(
        self, timesteps: Real[Array, ""] | Real[Array, " b"], latents: Float[Array, "b h w c"]
    ) -> Float[Array, "b t"]:
        """The embedding of each latent's timestep, in the latents' precision."""
        timesteps = jnp.broadcast_to(jnp.atleast_1d(timesteps), latents.shape[:1])
        x = timestep_embedding(timesteps, self.linear_1.in_features).astype(latents.dtype)
        return self.linear_2(jax.nn.silu(self.linear_1(x)))
