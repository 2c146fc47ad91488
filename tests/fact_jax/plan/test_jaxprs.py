"""Counts by hand: products, convolutions and their gradients, loops, live memory."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from fact_jax.ops.attention import attention_plain, attention_tiled
from fact_jax.ops.attention_kernels import attention_splash
from fact_jax.ops.convolution import convolve
from fact_jax.ops.precision import matmul_precision
from fact_jax.plan.jaxpr_costs import count_flops, flops_by_product, trace


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_product():
    assert count_flops(trace(jnp.matmul, shape(3, 5), shape(5, 7))) == 2 * 3 * 5 * 7
    einsum = trace(lambda a, b: jnp.einsum("bnhd,bmhd->bhnm", a, b), *[shape(2, 6, 4, 8)] * 2)
    assert count_flops(einsum) == 2 * (2 * 4) * 6 * 6 * 8


def test_products_by_precision():
    """Of float32 by the precision that is asked for, of other numbers by their dtype."""
    matrices, picture = (shape(3, 5), shape(5, 7)), (shape(1, 4, 4, 2), shape(3, 3, 2, 5))
    for precision, name in (("float32", "float32"), ("tf32", "tf32"), ("bfloat16", "default")):
        with matmul_precision(precision):
            assert flops_by_product(trace(jnp.matmul, *matrices)) == {name: 2 * 3 * 5 * 7}
            assert set(flops_by_product(trace(conv, *picture))) == {name}
    halves = [shape(3, 5, dtype=jnp.bfloat16), shape(5, 7, dtype=jnp.bfloat16)]
    both = trace(lambda a, b, c, d: (a @ b, c @ d), *matrices, *halves)
    assert flops_by_product(both) == {"default": 210, "bfloat16": 210}


def conv(x, kernel, stride=1):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_and_its_gradients(stride):
    """Each of the two gradients costs as much as the convolution itself."""
    x, kernel = shape(2, 8, 12, 5), shape(3, 3, 5, 7)
    once = 2 * 2 * (8 // stride) * (12 // stride) * 7 * 3 * 3 * 5
    assert count_flops(trace(lambda x, k: conv(x, k, stride), x, kernel)) == once

    def loss(x, kernel):
        return conv(x, kernel, stride).sum()

    assert count_flops(trace(jax.grad(loss, (0, 1)), x, kernel)) == 2 * once
    assert count_flops(trace(jax.value_and_grad(loss, 1), x, kernel)) == 2 * once


def test_gradient_of_a_product_by_one_side():
    def loss(w, x):
        return jnp.sin(x @ w).sum()

    once = 2 * 3 * 5 * 7
    assert count_flops(trace(jax.grad(loss), shape(5, 7), shape(3, 5))) == 2 * once
    assert count_flops(trace(jax.grad(loss, (0, 1)), shape(5, 7), shape(3, 5))) == 3 * once


def test_recomputation_is_counted():
    @jax.checkpoint
    def block(w, x):
        return jnp.sin(jnp.sin(x @ w) @ w)

    once = 2 * 3 * 5 * 5
    # Nobody asks for the value: both products again, then the gradient by w of both, by x of one.
    jaxpr = trace(jax.grad(lambda w, x: block(w, x).sum()), shape(5, 5), shape(3, 5))
    assert count_flops(jaxpr) == 5 * once
    jaxpr = trace(jax.value_and_grad(lambda w, x: block(w, x).sum()), shape(5, 5), shape(3, 5))
    assert count_flops(jaxpr) == 7 * once
    plain = trace(jax.grad(lambda w, x: block.__wrapped__(w, x).sum()), shape(5, 5), shape(3, 5))
    assert count_flops(plain) == 5 * once


def test_loops_count_in_full():
    def loop(w, x):
        return lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, length=11)[0]

    assert count_flops(trace(loop, shape(5, 5), shape(3, 5))) == 11 * 2 * 3 * 5 * 5
    nested = trace(lambda w, xs: lax.map(lambda x: loop(w, x), xs), shape(5, 5), shape(4, 3, 5))
    assert count_flops(nested) == 4 * 11 * 2 * 3 * 5 * 5


def test_branches_count_as_the_dearest():
    def either(flag, x):
        return lax.cond(flag, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(trace(either, shape(dtype=bool), shape(4, 4))) == 2 * 2 * 4**3


def test_endless_loop_has_no_count():
    def halve(x):
        return lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="no known number of rounds"):
        count_flops(trace(halve, shape(4, 4)))


def test_tiled_attention_counts_as_plain():
    """1,024 queries in two tiles, 3 heads: the loops of tiles and heads are all counted."""
    arguments = [shape(2, 1024, 3, 8)] * 3
    expected = 2 * (2 * 2 * 3 * 1024 * 1024 * 8)
    assert count_flops(trace(attention_plain, *arguments)) == expected
    assert count_flops(trace(attention_tiled, *arguments)) == expected


def test_of_a_platforms_forms_one_counts():
    def by_platform(x):
        return lax.platform_dependent(
            x, tpu=lambda x: x @ x @ x @ x, cuda=lambda x: x @ x, default=lambda x: x @ x @ x
        )

    jaxpr, once = trace(by_platform, shape(4, 4)), 2 * 4**3
    assert [count_flops(jaxpr, platform) for platform in ("tpu", "cuda", "cpu")] == [
        3 * once,
        once,
        2 * once,
    ]


def test_a_convolution_counts_its_taps_whatever_computes_it():
    """On a CPU large ones are computed with fewer products, which is no less of a model."""
    arguments = shape(1, 64, 64, 128), shape(3, 3, 128, 128)
    jaxpr = trace(
        lambda x, kernel: convolve(
            x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        ),
        *arguments,
    )
    direct = 2 * 64 * 64 * 128 * 128 * 9
    assert count_flops(jaxpr) == direct
    assert count_flops(jaxpr, "cpu") < direct


def test_what_each_device_computes_counts_for_all():
    mesh = AbstractMesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert count_flops(trace(split, shape(8, 5))) == 4 * (2 * 2 * 5 * 2)


def test_attention_kernels_count_their_products():
    """Two products forwards and five backwards, the scores again among them."""

    def gradients(q, k, v):
        return jax.vjp(functools.partial(attention_splash, interpret=True), q, k, v)[1](q)

    arguments = [jax.ShapeDtypeStruct((2, 256, 3, 32), jnp.bfloat16)] * 3
    once = 2 * (2 * 3 * 256 * 256 * 32)
    forward = trace(functools.partial(attention_splash, interpret=True), *arguments)
    assert count_flops(forward) == 2 * once
    rows = 2 * (2 * 3 * 256 * 32)  # of the result times its gradient
    assert count_flops(trace(gradients, *arguments)) == 7 * once + rows
