"""The convolution of most layers. How it is computed is decided here, as in ``attention``."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

FEW = 0.25
"""Fewer pixels than this for each channel that comes out are few."""


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options,
) -> Float[Array, "b H W o"]:
    """``lax.conv_general_dilated``, channels last, for a kernel that moves by one pixel at a time.

    On a CPU, XLA brings the kernel into another order in every call. Where the kernel is large and
    the pixels are few, as on the lower levels of a UNet, that takes longer than the arithmetic;
    there the patches are written out and multiplied by the kernel as it lies in memory.
    """

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def product(x, kernel):
        return as_product(x, kernel, padding)

    few = x.shape[1] * x.shape[2] <= FEW * kernel.shape[3]
    if not few or kernel.shape[:2] == (1, 1):
        return plain(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=product, default=plain)


def as_product(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "b H W o"]:
    """A convolution as one product of matrices: patches (b H W, k l i) by the kernel."""
    rows, columns, inputs, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    patches = [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(patches, axis=-1).reshape(-1, rows * columns * inputs)
    out = patches @ kernel.reshape(-1, outputs)
    return out.reshape(batch, height, width, outputs)
