"""Convolution, by the algorithm that was measured fastest for its shape and platform."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

IM2COL_PIXELS_PER_CHANNEL = 0.25
"""im2col is taken for at most this many pixels per output channel."""
WINOGRAD_MIN_PIXELS, WINOGRAD_MIN_CHANNELS = 2048, 64
"""Winograd is taken from this many pixels (batch x height x width) and channels (each side) on."""


def convolve(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options,
) -> Float[Array, "b H W o"]:
    """``lax.conv_general_dilated``, channels last.

    On a CPU, kernels that move by one pixel at a time are computed in other ways where those were
    measured to be faster, backwards too:

    - many pixels, 3 x 3: Winograd, in float32, with 2.25 times fewer products;
    - few pixels: im2col. XLA transposes the kernel in every call, which at the lower resolutions
      of a UNet takes longer than the arithmetic; im2col multiplies by it as it lies in memory.
    """

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    form = _form_on_cpu(x, kernel)
    if form is None or tuple(strides) != (1, 1) or _dilated(options):
        return plain(x, kernel)
    return lax.platform_dependent(
        x, kernel, cpu=lambda x, kernel: form(x, kernel, padding), default=plain
    )


def _form_on_cpu(x: Array, kernel: Array):
    rows, columns, *channels = kernel.shape
    batch, height, width, _ = x.shape
    if (rows, columns) == (1, 1):
        return None
    many = batch * height * width >= WINOGRAD_MIN_PIXELS and min(channels) >= WINOGRAD_MIN_CHANNELS
    if many and (rows, columns) == (3, 3):
        return conv_winograd
    return conv_im2col if height * width <= IM2COL_PIXELS_PER_CHANNEL * channels[1] else None


def _dilated(options: dict) -> bool:
    names = ("lhs_dilation", "rhs_dilation")
    return any(tuple(options.get(name) or (1, 1)) != (1, 1) for name in names)


def conv_im2col(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "k l i o"],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "b H W o"]:
    """im2col: one matrix product of patches (b H W, k l i) and the kernel."""
    rows, columns, inputs, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    batch, height, width = x.shape[0], x.shape[1] - rows + 1, x.shape[2] - columns + 1
    patches = [x[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    patches = jnp.concatenate(patches, axis=-1).reshape(-1, rows * columns * inputs)
    out = patches @ kernel.reshape(-1, outputs)
    return out.reshape(batch, height, width, outputs)


def conv_winograd(
    x: Float[Array, "b h w i"],
    kernel: Float[Array, "3 3 i o"],
    padding: Sequence[tuple[int, int]],
) -> Float[Array, "b H W o"]:
    """Winograd's minimal filtering F(2 x 2, 3 x 3) (Lavin & Gray 2015, arXiv 1509.09308).

    Two neighbours of an output depend on four neighbours of the input: ``A [(G g) * (B d)]`` with
    four products instead of six, and in two dimensions 16 instead of 36, each of them a product of
    matrices over the channels. The coefficients are 0, 1 and 1/2, so that in float32, in which all
    is computed, the result is as precise as the sum written out.
    """
    dtype = jnp.result_type(x, kernel)
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    inputs, outputs = kernel.shape[2:]
    height, width = (size + sum(pad) - 2 for size, pad in zip(x.shape[1:3], padding, strict=True))
    # An odd height or width is padded by one.
    (top, bottom), (left, right) = padding
    sides = ((0, 0), (top, bottom + height % 2), (left, right + width % 2), (0, 0))
    # Without a barrier XLA fuses, and so repeats, what computes x into each of the 16 products.
    x = lax.optimization_barrier(jnp.pad(x, sides))
    kernels = [_kernel_points(row) for row in _kernel_points(kernel)]
    tiles = [
        _input_points(_neighbours(row, axis=2)) for row in _input_points(_neighbours(x, axis=1))
    ]
    shape = (*tiles[0][0].shape[:3], outputs)
    products = [
        [
            (tile.reshape(-1, inputs) @ point).reshape(shape)
            for tile, point in zip(*row, strict=True)
        ]
        for row in zip(tiles, kernels, strict=True)
    ]
    columns = zip(*map(_output_pair, products), strict=True)
    rows = zip(*map(_output_pair, columns), strict=True)
    out = jnp.stack([jnp.stack(row, axis=3) for row in rows], axis=2)
    out = out.reshape(len(x), 2 * shape[1], 2 * shape[2], outputs)
    return out[:, :height, :width].astype(dtype)


def _neighbours(x: Array, axis: int) -> list[Array]:
    """The four along an axis that two outputs depend on, of every second output."""
    last = x.shape[axis] - 3
    return [lax.slice_in_dim(x, i, i + last, 2, axis) for i in range(4)]


def _input_points(neighbours: Sequence[Array]) -> tuple[Array, ...]:
    a, b, c, d = neighbours
    return a - c, b + c, c - b, b - d


def _kernel_points(kernel: Sequence[Array] | Array) -> tuple[Array, ...]:
    a, b, c = kernel
    return a, (a + b + c) / 2, (a - b + c) / 2, c


def _output_pair(products: Sequence[Array]) -> tuple[Array, Array]:
    a, b, c, d = products
    return a + b + c, b - c - d
