"""The Stable Diffusion 1.5 family of UNets, with an optional face adapter in every block.

Attribute names follow diffusers' ``UNet2DConditionModel``. Face tokens and their scale are
arguments of the call, and so is what ControlNets add.
"""

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Real

from fact_jax.models.adapter import FaceControls, Scale
from fact_jax.models.blocks import (
    AllFaceKeys,
    Block,
    ForwardContext,
    OnIncrement,
    TimeEmbedding,
    TransformerBlock,
    UNetEncoderConfig,
    down_blocks,
    faces_by_block,
    mid_block,
)
from fact_jax.models.layers import conv, group_norm
from fact_jax.ops.remat import Remat
from fact_jax.utils.errors import UserError
from fact_jax.utils.ranges import Count

Residuals = tuple[tuple[Float[Array, "b _ _ _"], ...], Float[Array, "b _ _ _"]]
"""What a ControlNet adds: to each skip of the encoder in call order, and to the middle block."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(UNetEncoderConfig):
    """Shape of a UNet; ``face_dim`` is the width of face tokens, or None if there are none."""

    sample_size: Count = 64
    out_channels: Count = 4
    up_attention: tuple[bool, ...] = (False, True, True, True)
    face_dim: Count | None = None  # type: ignore[misc]

    @classmethod
    def sd15(cls, *, face_dim: int | None = None) -> "UNetConfig":
        return cls(face_dim=face_dim)

    @classmethod
    def mini(cls, *, face_dim: int | None = None) -> "UNetConfig":
        """The miniature: 16 x 16 x 12 latents, nine transformer blocks, two of them at 16 x 16."""
        return cls(
            sample_size=16,
            in_channels=12,
            out_channels=12,
            block_out_channels=(64, 128, 192),
            down_attention=(False, True, True),
            up_attention=(True, True, True),
            layers_per_block=1,
            cross_attention_dim=64,
            heads=(2, 4, 6),
            norm_num_groups=16,
            face_dim=face_dim,
        )

    @classmethod
    def from_dict(cls, config: Mapping, *, face_dim: int | None = None) -> "UNetConfig":
        """Read diffusers' ``unet/config.json``.

        Raises ``UserError`` for a configuration whose forward pass differs from this model's.
        """
        return cls(face_dim=face_dim, **cls.parse_diffusers_config("unet", config))

    def block_channels(self) -> dict[str, int]:
        """Path of each transformer block -> its channels, in the order of the forward pass."""
        channels, layers = self.block_out_channels, self.layers_per_block
        parts = [("mid_block", 1, channels[-1])]
        for i, flag in enumerate(self.down_attention):
            parts.insert(i, (f"down_blocks.{i}", layers * flag, channels[i]))
        for i, flag in enumerate(self.up_attention):
            parts.append((f"up_blocks.{i}", (layers + 1) * flag, channels[-1 - i]))
        return {
            f"{path}.attentions.{j}.transformer_blocks.0": width
            for path, count, width in parts
            for j in range(count)
        }

    def to_dict(self) -> dict:
        """Write diffusers' ``unet/config.json``."""
        return self.to_diffusers_config("UNet2DConditionModel")


class UNet(nnx.Module):
    """UNet2DConditionModel of Stable Diffusion 1.5, of any width, with or without adapters."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs=rngs)
        self.down_blocks = down_blocks(config, rngs)
        self.mid_block = mid_block(config, rngs)
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
        adapters = [block.face for _, block in self.transformer_blocks()]
        if None in adapters:
            raise UserError("this UNet has no face adapter: load one before passing face tokens")
        return tuple(adapter.keys(face) for adapter in adapters if adapter is not None)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, ""] | Real[Array, " b"],
        text: Float[Array, "b n d"],
        face: Float[Array, "b m f"] | AllFaceKeys | None = None,
        face_scale: Scale | tuple[Scale, ...] = 1.0,
        on_increment: OnIncrement | None = None,
        remat: Remat | None = None,
        residuals: Residuals | None = None,
        controls: FaceControls | None = None,
        text_attention: Bool[Array, ""] | Bool[Array, " b"] | None = None,
    ) -> Float[Array, "b h w o"] | tuple[Float[Array, "b h w o"], tuple]:
        """Predict the noise (or velocity) in ``latents`` (height and width of any size).

        ``timesteps`` are whole or fractional, one for all samples or one a sample.
        ``face`` are face tokens or the result of :meth:`face_keys`; None leaves the adapters out.
        ``face_scale`` is a number or one a sample, or a tuple of such, one for each adapted block
        in call order; ``controls`` hold for all of them. With ``on_increment(x, delta, (h, w))``,
        called in every adapted block with its input and the increment it adds, the results come
        back as a tuple beside the prediction: FAIR is computed so without a second pass. ``remat``
        applies to each residual and each transformer block. ``residuals`` are what a ``ControlNet``
        gave for the same latents; those of several are added up before. ``text_attention``, one for
        all samples or one a sample, switches the text cross-attention of every block: where it is
        False it adds exactly nothing (None: it is on).
        """
        keys = face if face is None or isinstance(face, tuple) else self.face_keys(face)
        encoder = [*self.down_blocks, self.mid_block]
        faces = faces_by_block([*encoder, *self.up_blocks], keys, face_scale)
        context = ForwardContext(
            time=self.time_embedding(timesteps, latents),
            text=text,
            on_increment=on_increment,
            remat=remat,
            controls=controls or FaceControls(),
            text_attention=text_attention,
        )
        x, skips, results = context.encode(encoder, self.conv_in(latents), faces[: len(encoder)])
        if residuals is not None:
            x, skips = _controlled(x, skips, residuals)
        for block, block_faces in zip(self.up_blocks, faces[len(encoder) :], strict=True):
            for j in range(len(block.resnets)):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x, result = context.layer(block, j, x, block_faces)
                results += result
            for sampler in block.upsamplers:
                x = sampler(x, skips[-1].shape[1:3])

        out = self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
        return out if on_increment is None else (out, tuple(results))


def _controlled(
    x: Float[Array, "b h w c"], skips: list[Float[Array, "b _ _ _"]], residuals: Residuals
) -> tuple[Float[Array, "b h w c"], list[Float[Array, "b _ _ _"]]]:
    """The middle block's output and the skips, each with its residual added (arXiv 2302.05543)."""
    down, middle = residuals
    shapes = [a.shape for a in (*skips, x)], [a.shape for a in (*down, middle)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "these residuals are of a ControlNet for another UNet or for other latents: "
            f"{len(shapes[1])} of them, {len(shapes[0])} wanted, or other shapes"
        )
    return x + middle, [skip + added for skip, added in zip(skips, down, strict=True)]


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
