"""Convolutions computed otherwise than by XLA: where, and that they are the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fact_jax.ops.convolution import IM2COL_PIXELS_PER_CHANNEL as RATIO
from fact_jax.ops.convolution import WINOGRAD_MIN_CHANNELS as WIDTH
from fact_jax.ops.convolution import WINOGRAD_MIN_PIXELS as PIXELS
from fact_jax.ops.convolution import conv_winograd, convolve

pytestmark = pytest.mark.heavy

NUMBERS = ("NHWC", "HWIO", "NHWC")


ON_CPU = jax.default_backend() == "cpu"


def plain(x, kernel, padding):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)


def check(x, kernel, padding, otherwise: bool):
    """Equal to XLA's, values and gradients, and computed ``otherwise`` or not."""

    def call(x, kernel):
        return convolve(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)

    compiled = jax.jit(call).lower(x, kernel).compile().as_text()
    assert ("convolution(" in compiled) != (otherwise and ON_CPU)
    g = normal(*jax.eval_shape(call, x, kernel).shape, seed=2)

    def with_gradients(form):
        def both(x, kernel):
            out, gradient = jax.vjp(form, x, kernel)
            return out, *gradient(g)

        return jax.jit(both)(x, kernel)

    wanted, *gradients = with_gradients(lambda x, kernel: plain(x, kernel, padding))
    found, *own_gradients = with_gradients(call)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    for one, other in zip(own_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * max(1, np.abs(other).max()))


def normal(*shape: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (1, 0))])
def test_few_pixels(few, padding):
    outputs = round(15 / RATIO) + (0 if few else -1)
    check(normal(2, 3, 5, 6), normal(3, 3, 6, outputs, seed=1), padding, otherwise=few)


@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(
    ("size", "padding"),
    [
        ((32, 32), ((1, 1), (1, 1))),
        ((31, 29), ((1, 1), (1, 1))),
        ((31, 34), ((0, 2), (1, 0))),
        ((36, 29), ((0, 0), (2, 3))),
    ],
)
def test_many_pixels(many, size, padding):
    batch = -(-PIXELS // (size[0] * size[1])) - (0 if many else 1)
    kernel = normal(3, 3, WIDTH, WIDTH + 1, seed=1) / 24
    check(normal(batch, *size, WIDTH), kernel, padding, otherwise=many)


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (WIDTH - 1, WIDTH),
        (WIDTH, WIDTH - 1),
    ],
)
def test_narrow_layers_are_left_alone(inputs, outputs):
    kernel = normal(3, 3, inputs, outputs, seed=1) / 24
    check(normal(2, 32, 32, inputs), kernel, ((1, 1), (1, 1)), otherwise=False)


def test_minimal_filtering_is_as_precise():
    torch = pytest.importorskip("torch")
    x, kernel, padding = (
        normal(1, 32, 32, 128),
        normal(3, 3, 128, 64, seed=1) / 34,
        ((1, 1), (1, 1)),
    )
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(np.array(x, np.float64)).permute(0, 3, 1, 2),
        torch.from_numpy(np.array(kernel, np.float64)).permute(3, 2, 0, 1),
        padding=1,
    ).permute(0, 2, 3, 1)

    def error(found) -> float:
        return float(np.sqrt(np.mean((np.array(found, np.float64) - exact.numpy()) ** 2)))

    filtered = jax.jit(conv_winograd, static_argnums=2)(x, kernel, padding)
    assert error(filtered) < 1.5 * error(plain(x, kernel, padding))


@pytest.mark.parametrize(
    "options", [{"strides": (2, 2)}, {"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 1)}], ids=str
)
@pytest.mark.parametrize("shape", [(1, 4, 4, 64), (2, 32, 32, 64)], ids=["few", "many"])
def test_other_convolutions_are_left_alone(shape, options):
    x, kernel = normal(*shape), normal(3, 3, 64, 128, seed=1)
    options = dict(options)
    strides, padding = options.pop("strides", (1, 1)), ((1, 1), (1, 1))
    options["dimension_numbers"] = NUMBERS
    wanted = lax.conv_general_dilated(x, kernel, strides, padding, **options)
    np.testing.assert_array_equal(convolve(x, kernel, strides, padding, **options), wanted)


def test_precision_of_the_result():
    x, kernel = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 64), jnp.bfloat16)
    found = convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS)
    assert found.dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bits_are_filtered_in_float32(dtype):
    """So that what comes out is off by its own rounding alone."""
    x, kernel = (
        normal(2, 32, 32, WIDTH).astype(dtype),
        normal(3, 3, WIDTH, WIDTH, seed=1) / 24,
    )
    kernel, padding = kernel.astype(dtype), ((1, 1), (1, 1))
    found = jax.jit(lambda *a: convolve(*a, (1, 1), padding, dimension_numbers=NUMBERS))(x, kernel)
    wanted = plain(x.astype(jnp.float32), kernel.astype(jnp.float32), padding)
    assert found.dtype == dtype
    # Half a unit in the last place, and what float32 adds to it.
    rounding = jnp.finfo(dtype).eps / 2 * np.abs(wanted) + 1e-5
    assert (np.abs(found.astype(jnp.float32) - wanted) <= rounding).all()
