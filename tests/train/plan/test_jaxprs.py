"""Counts by hand: products, convolutions and their gradients, loops, live memory."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from fact_jax.ops.attention import attention_plain, attention_tiled
from fact_train.engine.jaxpr_costs import count_flops, peak_bytes, trace


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def test_product():
    assert count_flops(trace(jnp.matmul, shape(3, 5), shape(5, 7))) == 2 * 3 * 5 * 7
    einsum = trace(lambda a, b: jnp.einsum("bnhd,bmhd->bhnm", a, b), *[shape(2, 6, 4, 8)] * 2)
    assert count_flops(einsum) == 2 * (2 * 4) * 6 * 6 * 8


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


def test_live_memory():
    """sin(x) and cos of it are live together, then the product; x itself is the caller's."""

    def chain(x):
        a = jnp.sin(x)  # 400 B
        b = jnp.cos(a)  # 400 B beside a
        return b.sum()  # a is gone

    assert peak_bytes(trace(chain, shape(10, 10))) == 800

    def keep(x):
        a = jnp.sin(x)
        b = jnp.cos(a)
        c = jnp.exp(b)
        return a + c

    assert peak_bytes(trace(keep, shape(10, 10))) == 1200


def test_checkpointed_blocks_hold_less():
    def deep(x, wrap):
        for _ in range(6):
            x = wrap(lambda x: jnp.sin(jnp.cos(jnp.sin(jnp.cos(x)))))(x)
        return x.sum()

    plain = peak_bytes(trace(jax.grad(lambda x: deep(x, lambda f: f)), shape(100)))
    saved = peak_bytes(trace(jax.grad(lambda x: deep(x, jax.checkpoint)), shape(100)))
    assert saved < 0.7 * plain
