import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fact_jax.convolution import FEW, convolve

NUMBERS = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel, padding):
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("padding", [((1, 1), (1, 1)), ((0, 2), (1, 0))])
def test_is_a_convolution(few, padding):
    size = (3, 5)
    outputs = round(15 / FEW) + (0 if few else -1)
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], (2, *size, 6)), jax.random.normal(keys[1], (3, 3, 6, 60))
    kernel = kernel[..., :outputs]

    def call(x, kernel):
        return convolve(x, kernel, (1, 1), padding, dimension_numbers=NUMBERS)

    compiled = jax.jit(call).lower(x, kernel).compile().as_text()
    on_cpu = jax.default_backend() == "cpu"
    assert ("convolution(" in compiled) != (few and on_cpu)
    wanted, gradient = jax.vjp(lambda x, k: plain(x, k, padding), x, kernel)
    found, own_gradient = jax.vjp(call, x, kernel)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    g = jax.random.normal(keys[2], wanted.shape)
    for one, other in zip(own_gradient(g), gradient(g), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_precision_of_the_result():
    x, kernel = jnp.ones((1, 2, 2, 4), jnp.bfloat16), jnp.ones((3, 3, 4, 64), jnp.bfloat16)
    found = convolve(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NUMBERS)
    assert found.dtype == jnp.bfloat16
