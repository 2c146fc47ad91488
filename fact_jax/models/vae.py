"""AutoencoderKL: pictures to latents and back (Rombach et al. 2022, arXiv 2112.10752).

Attribute names follow diffusers. Latents here are unscaled; multiply by ``config.scaling_factor``
before diffusion and divide after.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from fact_jax.models.layers import (
    Attention,
    Downsample,
    ResnetBlock,
    Upsample,
    check_diffusers_config,
    conv,
    group_norm,
)

_EPS = 1e-6
_SUPPORTED = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None, 0, 0.0),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Shape of an AutoencoderKL. Each level but the last halves height and width."""

    sample_size: int = 512
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @classmethod
    def sd15(cls) -> "VAEConfig":
        return cls()

    @classmethod
    def mini(cls) -> "VAEConfig":
        """The miniature: 128 x 128 pictures, 16 x 16 x 12 latents; narrow where pixels are many.

        Few groups: a group of one narrow channel would lose its mean, and the picture its colours.
        """
        return cls(
            sample_size=128,
            latent_channels=12,
            block_out_channels=(16, 16, 48, 96),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=1.0,
        )

    @property
    def downscale(self) -> int:
        """Pixels a latent cell, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping) -> "VAEConfig":
        """Read diffusers' ``vae/config.json``; ``UserError`` for what this model does not do."""
        levels = len(config.get("block_out_channels", cls.block_out_channels))
        check_diffusers_config(
            "vae",
            config,
            {
                **_SUPPORTED,
                "down_block_types": (("DownEncoderBlock2D",) * levels,),
                "up_block_types": (("UpDecoderBlock2D",) * levels,),
            },
        )
        names = [field.name for field in dataclasses.fields(cls)]
        values: dict[str, Any] = {
            name: config[name] for name in names if config.get(name) is not None
        }
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values)

    def to_dict(self) -> dict:
        """Write diffusers' ``vae/config.json``."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            **dataclasses.asdict(self),
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }


class PixelAttention(Attention):
    """Single-head self-attention over the pixels of the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(channels, heads=1, qkv_bias=True, rngs=rngs)
        self.group_norm = group_norm(channels, groups, _EPS, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:  # type: ignore[override]
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, c)
        return x + self.attend(tokens, *self.keys_values(tokens)).reshape(b, h, w, c)


class MiddleBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResnetBlock(channels, channels, groups=groups, eps=_EPS, rngs=rngs) for _ in range(2)]
        )
        self.attentions = nnx.List([PixelAttention(channels, groups, rngs=rngs)])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nnx.Module):
    """Residual blocks of one resolution, then a resampler if there is one."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        layers: int,
        groups: int,
        *,
        resampler: Downsample | Upsample | None,
        rngs: nnx.Rngs,
    ):
        self.resnets = nnx.List(
            [
                ResnetBlock(
                    inputs if j == 0 else outputs, outputs, groups=groups, eps=_EPS, rngs=rngs
                )
                for j in range(layers)
            ]
        )
        if isinstance(resampler, Downsample):
            self.downsamplers = nnx.List([resampler])
        elif isinstance(resampler, Upsample):
            self.upsamplers = nnx.List([resampler])

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        for resnet in self.resnets:
            x = resnet(x)
        for sampler in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = sampler(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block,
                    groups,
                    # diffusers pads the VAE's strided convolutions on the far sides only.
                    resampler=Downsample(width, (0, 1), rngs=rngs) if i < len(widths) - 1 else None,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.mid_block = MiddleBlock(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = group_norm(widths[-1], groups, _EPS, rngs=rngs)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[0], rngs=rngs)
        self.mid_block = MiddleBlock(widths[0], groups, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                Level(
                    widths[max(i - 1, 0)],
                    width,
                    config.layers_per_block + 1,
                    groups,
                    resampler=Upsample(width, rngs=rngs) if i < len(widths) - 1 else None,
                    rngs=rngs,
                )
                for i, width in enumerate(widths)
            ]
        )
        self.conv_norm_out = group_norm(widths[-1], groups, _EPS, rngs=rngs)
        self.conv_out = conv(widths[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W d"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """Encoder to a diagonal Gaussian over latents, and decoder."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        latent = config.latent_channels
        self.quant_conv = conv(2 * latent, 2 * latent, 1, rngs=rngs)
        self.post_quant_conv = conv(latent, latent, 1, rngs=rngs)

    def encode(
        self, images: Float[Array, "b H W c"]
    ) -> tuple[Float[Array, "b h w d"], Float[Array, "b h w d"]]:
        """Mean and log-variance of the latents of ``images`` (range [-1, 1])."""
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(log_variance, -30.0, 20.0)

    def decode(self, latents: Float[Array, "b h w d"]) -> Float[Array, "b H W c"]:
        """Pictures (about [-1, 1], not clipped) of unscaled ``latents``."""
        return self.decoder(self.post_quant_conv(latents))
