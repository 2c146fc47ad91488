"""Layers that two or more of the models share. Channels last throughout."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jaxtyping import Array, Float, Real

from fact_jax.ops.attention import attention
from fact_jax.ops.attention_kernels import HiddenKeys
from fact_jax.ops.convolution import convolve
from fact_jax.utils.errors import UserError


def check_diffusers_config(model: str, config: Mapping, supported: Mapping[str, tuple]) -> None:
    """Refuse a peer's configuration whose value changes the forward pass in a way we do not have.

    ``supported`` maps a key to the values that mean what our model computes; absent keys are fine.
    Raises ``UserError`` naming every such key at once.
    """
    bad = [
        f"{key}={config[key]!r} (supported: {', '.join(map(repr, values))})"
        for key, values in supported.items()
        if key in config and _plain(config[key]) not in values
    ]
    if bad:
        raise UserError(f"{model} configuration not supported: {'; '.join(bad)}")


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


class GroupNorm(nnx.GroupNorm):
    """``nnx.GroupNorm`` that sums over the pixels of each channel first, then over its group.

    Split into groups before, large pictures are copied to another layout on TPUs, in float32. The
    variance of float32 takes a second pass, so that its rounding agrees with PyTorch's. That of 16
    bits does not: E[x^2] - E[x]^2 in float32 loses less than the numbers' own rounding, as long as
    their mean is below a thousand standard deviations, and both sums are computed where x is made.
    """

    def __call__(self, x: Float[Array, "b *n c"], *, mask: None = None) -> Float[Array, "b *n c"]:
        pixels = tuple(range(1, x.ndim - 1))

        def mean(values: Float[Array, "b *n c"]) -> Float[Array, "b *ones c"]:
            channels = values.mean(pixels, keepdims=True)
            groups = channels.reshape(*channels.shape[:-1], self.num_groups, self.group_size)
            return jnp.repeat(groups.mean(-1), self.group_size, axis=-1)

        wide = x.astype(jnp.float32)
        centre = mean(wide)
        if x.dtype.itemsize < 4:
            variance = jnp.maximum(mean(jnp.square(wide)) - jnp.square(centre), 0.0)
        else:
            variance = mean(jnp.square(wide - centre))
        scale, bias = self.scale[...], self.bias[...]
        factor = jax.lax.rsqrt(variance + self.epsilon) * scale
        return ((wide - centre) * factor + bias).astype(jnp.result_type(x, scale, bias))


def group_norm(channels: int, groups: int, eps: float, *, rngs: nnx.Rngs) -> GroupNorm:
    return GroupNorm(channels, num_groups=groups, epsilon=eps, rngs=rngs)


@jax.custom_vjp
def _cast_to_float32(bias: Float[Array, " c"]) -> Float[Array, " c"]:
    return bias.astype(jnp.float32)


def _cast_forward(bias):
    return _cast_to_float32(bias), bias


def _cast_backward(bias, gradient):
    # What is rounded to 16 bits at once XLA adds up in 16 bits on TPUs.
    return (jax.lax.optimization_barrier(gradient).astype(bias.dtype),)


_cast_to_float32.defvjp(_cast_forward, _cast_backward)


def bias_in_float32(bias: Float[Array, " c"]) -> Float[Array, " c"]:
    """A bias of 16 bits in float32, in which its gradient is summed too; others as they are."""
    return _cast_to_float32(bias) if bias.dtype.itemsize < 4 else bias


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm``, the gradient of whose bias is summed in float32."""

    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        return super().__call__(x).astype(jnp.result_type(x, self.bias[...]))


def _promote(values, *, dtype=None):
    x, scale, bias = promote_dtype(values, dtype=dtype)
    return x, scale, bias_in_float32(bias)


def layer_norm(channels: int, eps: float = 1e-5, *, rngs: nnx.Rngs) -> LayerNorm:
    """LayerNorm over the last axis, PyTorch's default epsilon."""
    return LayerNorm(
        channels, epsilon=eps, use_fast_variance=False, promote_dtype=_promote, rngs=rngs
    )


class Linear(nnx.Linear):
    """``nnx.Linear``, the gradient of whose bias is summed in float32."""

    def __call__(self, inputs: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
        if self.bias is None:
            return super().__call__(inputs)
        hidden = jnp.dot(inputs, self.kernel[...])
        return (hidden + bias_in_float32(self.bias[...])).astype(hidden.dtype)


def conv(inputs: int, outputs: int, kernel: int = 3, *, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution that keeps height and width."""
    return nnx.Conv(
        inputs,
        outputs,
        (kernel, kernel),
        padding=kernel // 2,
        conv_general_dilated=convolve,
        rngs=rngs,
    )


def split_heads(x: Float[Array, "b n c"], heads: int) -> Float[Array, "b n h d"]:
    return x.reshape(*x.shape[:-1], heads, -1)


def merge_heads(x: Float[Array, "b n h d"]) -> Float[Array, "b n c"]:
    return x.reshape(*x.shape[:-2], -1)


def timestep_embedding(timesteps: Real[Array, " b"], dim: int) -> Float[Array, "b d"]:
    """Sinusoidal embedding, cosines first, as Stable Diffusion 1.5 has it."""
    half = dim // 2
    # In double precision: a timestep multiplies a frequency's rounding by up to a thousand.
    frequencies = np.exp(-np.log(10000.0) * np.arange(half) / half)
    angles = timesteps.astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample_nearest(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b H W c"]:
    """Nearest-neighbour enlargement to ``size``, which need not be a whole multiple."""
    h, w = x.shape[1:3]
    if size == (2 * h, 2 * w):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    rows = (jnp.arange(size[0]) * h) // size[0]
    columns = (jnp.arange(size[1]) * w) // size[1]
    return x[:, rows][:, :, columns]


class ResnetBlock(nnx.Module):
    """norm, SiLU, conv, (+ time), norm, SiLU, conv, plus the input (through a 1 x 1 if need be)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        groups: int,
        eps: float,
        time_dim: int | None = None,
        rngs: nnx.Rngs,
    ):
        self.norm1 = group_norm(inputs, groups, eps, rngs=rngs)
        self.conv1 = conv(inputs, outputs, rngs=rngs)
        self.time_emb_proj = Linear(time_dim, outputs, rngs=rngs) if time_dim else None
        self.norm2 = group_norm(outputs, groups, eps, rngs=rngs)
        self.conv2 = conv(outputs, outputs, rngs=rngs)
        self.conv_shortcut = conv(inputs, outputs, 1, rngs=rngs) if inputs != outputs else None

    def __call__(
        self, x: Float[Array, "b h w c"], time: Float[Array, "b t"] | None = None
    ) -> Float[Array, "b h w d"]:
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(jax.nn.silu(time))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Downsample(nnx.Module):
    """Halve height and width by a strided convolution with the given padding of each side."""

    def __init__(self, channels: int, padding: tuple[int, int], *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels, channels, (3, 3), strides=(2, 2), padding=(padding, padding), rngs=rngs
        )

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b H W c"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling (or to a given size), then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w c"], size: tuple[int, int] | None = None
    ) -> Float[Array, "b H W c"]:
        return self.conv(upsample_nearest(x, size or (2 * x.shape[1], 2 * x.shape[2])))


class Identity(nnx.Module):
    """Keeps the place of a layer without parameters, so that list indices match PyTorch's keys."""

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        return x


class Attention(nnx.Module):
    """Multi-head attention; the context defaults to the queries' own sequence."""

    def __init__(
        self,
        dim: int,
        heads: int,
        context_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        context_dim = context_dim or dim
        self.to_q = Linear(dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_k = Linear(context_dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_v = Linear(context_dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([Linear(dim, dim, rngs=rngs)])

    def keys_values(
        self, context: Float[Array, "b m e"]
    ) -> tuple[Float[Array, "b m c"], Float[Array, "b m c"]]:
        return self.to_k(context), self.to_v(context)

    def attend(
        self,
        x: Float[Array, "b n c"],
        keys: Float[Array, "b m c"],
        values: Float[Array, "b m c"],
        hidden: HiddenKeys | None = None,
    ) -> Float[Array, "b n c"]:
        """Attention of ``x`` over keys and values that are already projected."""
        q, k, v = (split_heads(a, self.heads) for a in (self.to_q(x), keys, values))
        return self.to_out[0](merge_heads(attention(q, k, v, hidden)))

    def __call__(
        self, x: Float[Array, "b n c"], context: Float[Array, "b m e"] | None = None
    ) -> Float[Array, "b n c"]:
        return self.attend(x, *self.keys_values(x if context is None else context))


class GEGLU(nnx.Module):
    """Gated linear unit with the exact (erf) GELU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, inner: int, *, rngs: nnx.Rngs):
        self.proj = Linear(dim, 2 * inner, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n f"]:
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net = nnx.List(
            [GEGLU(dim, 4 * dim, rngs=rngs), Identity(), Linear(4 * dim, dim, rngs=rngs)]
        )

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        for layer in self.net:
            x = layer(x)
        return x
