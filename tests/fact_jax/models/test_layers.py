"""Layers that the models share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.extend.core import jaxprs_in_params

from fact_jax.models.layers import Linear, group_norm, layer_norm

TOKENS, WIDTH = 64, 8
LAYERS = {
    "linear": lambda: Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0)),
    "norm": lambda: layer_norm(WIDTH, rngs=nnx.Rngs(0)),
}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_biases_are_summed_in_float32(name, dtype):
    """And rounded behind a barrier, without which TPUs would add up in the 16 bits."""
    graph, params = nnx.split(LAYERS[name]())
    params = jax.tree.map(lambda value: value.astype(dtype), params)

    def gradients(params, x):
        y, backward = jax.vjp(lambda params: nnx.merge(graph, params)(x), params)
        assert y.dtype == dtype
        return backward(y)[0]

    program = jax.make_jaxpr(gradients, return_shape=True)
    traced, shapes = program(params, jnp.ones((TOKENS, WIDTH), dtype))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {dtype}
    found = list(equations(traced.jaxpr))
    sums = [eqn for eqn in found if eqn.primitive.name == "reduce_sum"]
    over_tokens = [eqn.invars[0].aval for eqn in sums if eqn.outvars[0].aval.shape == (WIDTH,)]
    assert over_tokens
    assert {value.dtype.name for value in over_tokens} == {"float32"}
    barred = [eqn.invars[0].aval for eqn in found if eqn.primitive.name == "optimization_barrier"]
    assert [(value.shape, value.dtype.name) for value in barred] == [((WIDTH,), "float32")]


@pytest.mark.parametrize("name", LAYERS)
def test_16_bits_under_parameters_of_float32_come_out_in_float32(name):
    assert LAYERS[name]()(jnp.ones((2, WIDTH), jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("groups", [1, 4, WIDTH])
def test_group_norm_is_pytorchs(groups):
    """Also of numbers far from zero, where a variance in one pass loses its digits."""
    norm = group_norm(WIDTH, groups, 1e-5, rngs=nnx.Rngs(0))
    norm.scale[...], norm.bias[...] = jax.random.normal(jax.random.key(0), (2, WIDTH))
    x = 100 + jax.random.normal(jax.random.key(1), (2, 5, 7, WIDTH))
    wanted = torch.nn.functional.group_norm(
        torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).double(),
        groups,
        *(torch.from_numpy(np.array(value[...])).double() for value in (norm.scale, norm.bias)),
    )
    # Numbers near 100 lie 8e-6 apart; in one pass it is 8e-3 off.
    np.testing.assert_allclose(norm(x), wanted.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("far", [0, 10, 100])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_group_norm_of_16_bits_has_statistics_in_float32(dtype, far):
    """What they lose, also far from zero, is little beside the rounding of what is given."""
    norm = group_norm(WIDTH, 2, 1e-5, rngs=nnx.Rngs(0))
    exact = far + jax.random.normal(jax.random.key(0), (2, 16, 16, WIDTH))
    given = exact.astype(dtype)
    graph, params = nnx.split(norm)
    half = nnx.merge(graph, jax.tree.map(lambda value: value.astype(dtype), params))
    assert half(given).dtype == dtype
    wanted = norm(given.astype(jnp.float32))  # in two passes
    lost = jnp.linalg.norm(norm(given) - wanted)
    assert lost < 0.05 * jnp.linalg.norm(norm(exact) - wanted)


def test_gradients_through_a_group_norm_of_16_bits():
    norm = group_norm(WIDTH, 2, 1e-5, rngs=nnx.Rngs(0))
    x = (3 + jax.random.normal(jax.random.key(0), (2, 16, 16, WIDTH))).astype(jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), x.shape)
    found, wanted = (
        jax.grad(lambda x: (norm(x) * weight).sum())(given).astype(jnp.float32)
        for given in (x, x.astype(jnp.float32))
    )
    np.testing.assert_allclose(found, wanted.astype(jnp.bfloat16), rtol=2**-7, atol=1e-5)
