"""ControlNet of Stable Diffusion 1.5 (arXiv 2302.05543).

Attribute names follow diffusers' ``ControlNetModel``. It sees the text and never the face.
"""

import dataclasses
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from fact_jax.models.adapter import FaceControls, Scale
from fact_jax.models.blocks import (
    ForwardContext,
    TimeEmbedding,
    UNetEncoderConfig,
    down_blocks,
    faces_by_block,
    mid_block,
)
from fact_jax.models.layers import check_diffusers_config, conv
from fact_jax.models.unet import Residuals
from fact_jax.utils.errors import UserError

_SUPPORTED = {
    "controlnet_conditioning_channel_order": ("rgb",),
    "global_pool_conditions": (False,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlNetConfig(UNetEncoderConfig):
    """Shape of a ControlNet: its UNet's encoder, and the embedding of the control picture."""

    conditioning_channels: int = 3
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)

    @classmethod
    def sd15(cls) -> "ControlNetConfig":
        return cls()

    @classmethod
    def from_dict(cls, config: Mapping) -> "ControlNetConfig":
        """Read diffusers' ``config.json``.

        Raises ``UserError`` for a configuration whose forward pass differs from this model's.
        """
        check_diffusers_config("controlnet", config, _SUPPORTED)
        return cls(**cls.parse_diffusers_config("controlnet", config))

    def to_dict(self) -> dict:
        """Write diffusers' ``config.json``."""
        return self.to_diffusers_config("ControlNetModel")

    @property
    def stride(self) -> int:
        """Pixels of the picture for one of the latents'."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class ConditionEmbedding(nnx.Module):
    """A picture brought to the size of the latents by strided convolutions."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], rngs=rngs)
        self.blocks = nnx.List([])
        for inner, outer in itertools.pairwise(widths):
            self.blocks.append(conv(inner, inner, rngs=rngs))
            self.blocks.append(
                nnx.Conv(inner, outer, (3, 3), strides=(2, 2), padding=(1, 1), rngs=rngs)
            )
        self.conv_out = conv(widths[-1], config.block_out_channels[0], rngs=rngs)

    def __call__(self, images: Float[Array, "b H W k"]) -> Float[Array, "b h w c"]:
        x = jax.nn.silu(self.conv_in(images))
        for block in self.blocks:
            x = jax.nn.silu(block(x))
        return self.conv_out(x)


class ControlNet(nnx.Module):
    """A copy of the UNet's encoder whose outputs are added to the UNet's skips."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        widths = config.block_out_channels
        self.conv_in = conv(config.in_channels, widths[0], rngs=rngs)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs=rngs)
        self.controlnet_cond_embedding = ConditionEmbedding(config, rngs=rngs)
        self.down_blocks = down_blocks(config, rngs)
        self.mid_block = mid_block(config, rngs)
        skips = [widths[0]]
        for level, width in enumerate(widths):
            skips += [width] * (config.layers_per_block + (level < len(widths) - 1))
        self.controlnet_down_blocks = nnx.List([conv(c, c, 1, rngs=rngs) for c in skips])
        self.controlnet_mid_block = conv(widths[-1], widths[-1], 1, rngs=rngs)

    def embed(self, images: Float[Array, "b H W k"]) -> Float[Array, "b h w c"]:
        """Features of control pictures in [0, 1] (poses, edges), once a generation.

        Height and width are the latents' times ``config.stride`` (8 in Stable Diffusion 1.5).
        """
        stride = self.config.stride
        if images.shape[1] % stride or images.shape[2] % stride:
            raise UserError(
                f"a control picture of {images.shape[1]} x {images.shape[2]}: height and width "
                f"must be multiples of {stride}"
            )
        return self.controlnet_cond_embedding(images)

    def __call__(
        self,
        latents: Float[Array, "b h w c"],
        timesteps: Real[Array, ""] | Real[Array, " b"],
        text: Float[Array, "b n d"],
        condition: Float[Array, "#b H W e"],
        scale: Scale = 1.0,
    ) -> Residuals:
        """What to pass to the UNet as ``residuals`` with the same latents, timesteps and text.

        ``condition`` is the result of :meth:`embed`. ``scale`` is how strongly it steers: one for
        all samples or one a sample; at 0 the UNet is the base, bit for bit.
        """
        if condition.shape[1:3] != latents.shape[1:3]:
            raise UserError(
                f"control features of {condition.shape[1]} x {condition.shape[2]} for latents of "
                f"{latents.shape[1]} x {latents.shape[2]}: the control picture has another size "
                "than the portrait"
            )
        time = self.time_embedding(timesteps, latents)
        context = ForwardContext(time=time, text=text, controls=FaceControls())
        blocks = [*self.down_blocks, self.mid_block]
        faces = faces_by_block(blocks, None, 0.0)
        x, skips, _ = context.encode(blocks, self.conv_in(latents) + condition, faces)
        scale = jnp.asarray(scale, x.dtype)
        scale = scale[:, None, None, None] if scale.ndim else scale
        down = zip(self.controlnet_down_blocks, skips, strict=True)
        return tuple(scale * out(skip) for out, skip in down), scale * self.controlnet_mid_block(x)
