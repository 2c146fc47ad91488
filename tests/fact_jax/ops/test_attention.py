"""The plain form against the definition in double precision; the tiled form against the plain."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.ops import attention as module
from fact_jax.ops.attention import (
    attention,
    attention_form,
    attention_plain,
    attention_query_chunked,
    attention_tiled,
)
from fact_jax.ops.attention_kernels import HiddenKeys
from tests.fact_jax.tiny import normal

pytestmark = pytest.mark.heavy

Q, K, V = normal(1, 2, 10, 3, 4), normal(2, 2, 7, 3, 4), normal(3, 2, 7, 3, 4)


# Every query sees a key at least.
MASK = jnp.asarray(np.random.default_rng(5).random((2, 10, 7)) < 0.4).at[:, :, 2].set(True)


def by_definition(q, k, v, mask=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[-1]))
    for b, n, h in np.ndindex(q.shape[:3]):
        weights = np.exp(k[b, :, h] @ q[b, n, h] / np.sqrt(q.shape[-1]))
        weights *= 1.0 if mask is None else np.asarray(mask[b, n])
        out[b, n, h] = weights @ v[b, :, h] / weights.sum()
    return out


def test_by_hand():
    """Scores 0 and ln 3 after the scale of 1/2: weights 1/4 and 3/4."""
    q = jnp.array([2.0, 0, 0, 0]).reshape(1, 1, 1, 4)
    k = jnp.array([[0.0, 5, 5, 5], [np.log(3), 0, 0, 0]]).reshape(1, 2, 1, 4)
    v = jnp.array([[4.0, 0, 0, 1], [8.0, 0, 0, 1]]).reshape(1, 2, 1, 4)
    expected = np.array([7.0, 0, 0, 1]).reshape(1, 1, 1, 4)
    for form in (attention_plain, attention_tiled, attention_query_chunked):
        np.testing.assert_allclose(form(q, k, v), expected, atol=1e-6)


def test_plain_is_the_definition():
    np.testing.assert_allclose(attention_plain(Q, K, V), by_definition(Q, K, V), atol=1e-6)


@pytest.mark.parametrize("form", [attention_tiled, attention_query_chunked])
@pytest.mark.parametrize("tile", [4, 5, 64])
def test_tiled_is_plain(tile, form):
    """Ten queries by tiles of 4 (the last one padded), of 5, and of more than there are."""
    weights = normal(4, *Q.shape)

    def loss(form, *args):
        return (form(*args) * weights).sum()

    def tiled(q, k, v):
        return form(q, k, v, tile=tile)

    np.testing.assert_allclose(tiled(Q, K, V), attention_plain(Q, K, V), atol=1e-6)
    ours = jax.jit(jax.grad(lambda *a: loss(tiled, *a), argnums=(0, 1, 2)))(Q, K, V)
    plain = jax.jit(jax.grad(lambda *a: loss(attention_plain, *a), argnums=(0, 1, 2)))(Q, K, V)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("form", [attention_tiled, attention_query_chunked])
@pytest.mark.parametrize("tile", [4, 64])
def test_masked(form, tile):
    """What a query may not see does not count at all, in the result and in the gradient."""
    expected = by_definition(Q, K, V, MASK)
    np.testing.assert_allclose(attention_plain(Q, K, V, MASK), expected, atol=1e-6)
    np.testing.assert_allclose(form(Q, K, V, MASK, tile=tile), expected, atol=1e-6)
    for row in (MASK[:, :1], MASK[:1, :1]):  # one for all queries, and for all samples
        expected = by_definition(Q, K, V, np.broadcast_to(row, MASK.shape))
        np.testing.assert_allclose(form(Q, K, V, row, tile=tile), expected, atol=1e-6)
    hidden = MASK.at[:, :, 3].set(False)
    strange = K.at[:, 3].set(1e4), V.at[:, 3].set(-1e4)
    np.testing.assert_array_equal(
        form(Q, K, V, hidden, tile=tile), form(Q, *strange, hidden, tile=tile)
    )

    def gradient(call, **more):
        total = jax.grad(lambda *a: (call(*a, hidden, **more) ** 2).sum(), argnums=(0, 1, 2))
        return jax.jit(total)(Q, K, V)

    ours = gradient(form, tile=tile)
    for one, other in zip(ours, gradient(attention_plain), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert not ours[1][:, 3].any()


def test_large_scores_do_not_overflow():
    for form in (attention_plain, attention_tiled, attention_query_chunked):
        assert np.isfinite(form(1e4 * Q, K, V)).all()


def test_half_precision_stays_half_precision():
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]
    for form in (attention_plain, attention_tiled, attention_query_chunked):
        out = form(*half)
        assert out.dtype == jnp.bfloat16
        # Eight bits of mantissa, outputs of order one.
        np.testing.assert_allclose(out.astype(jnp.float32), by_definition(*half), atol=0.03)


def test_the_size_of_the_matrix_decides(monkeypatch):
    """Ten queries on seven keys still fit; eleven do not."""
    called = []

    def record(name, q, k, v, mask):
        called.append(name)
        return q

    monkeypatch.setattr(module, "KEPT_MATRIX_LIMIT", 0)
    monkeypatch.setattr(module, "PLAIN_MATRIX_LIMIT_CPU", 70)
    for name in ("plain", "tiled"):
        monkeypatch.setattr(module, f"attention_{name}", functools.partial(record, name))
    attention(Q, K, V)
    attention(normal(1, 2, 11, 3, 4), K, V)
    assert called == ["plain", "tiled"]


def kept(q, k, v):
    """Sizes of what the backward pass is given."""
    return {leaf.size for leaf in jax.tree.leaves(jax.vjp(attention, q, k, v)[1])}


def test_large_matrices_are_not_kept(monkeypatch):
    matrix = 2 * 3 * 10 * 7
    assert matrix in kept(Q, K, V)
    monkeypatch.setattr(module, "KEPT_MATRIX_LIMIT", 69)
    assert max(kept(Q, K, V)) == Q.size < matrix


@pytest.mark.parametrize("limit", [1, 70])
def test_the_gradient_on_this_platform(monkeypatch, limit):
    """What is differentiated is the form for the platform, whose gradient is written by hand."""
    monkeypatch.setattr(module, "KEPT_MATRIX_LIMIT", 0)
    monkeypatch.setattr(module, "PLAIN_MATRIX_LIMIT", limit)
    monkeypatch.setattr(module, "PLAIN_MATRIX_LIMIT_CPU", limit)
    weights = normal(4, *Q.shape)
    ours, plain = (
        jax.jit(jax.grad(lambda *a, form=form: (form(*a) * weights).sum(), argnums=(0, 1, 2)))
        for form in (attention, attention_plain)
    )
    for one, other in zip(ours(Q, K, V), plain(Q, K, V), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    hidden = HiddenKeys(~MASK, jnp.eye(7, dtype=bool)[None])  # a group for each key
    masked = jax.jit(
        jax.grad(lambda *a: (attention(*a, hidden) * weights).sum(), argnums=(0, 1, 2))
    )
    expected = jax.grad(lambda *a: (attention_plain(*a, MASK) * weights).sum(), argnums=(0, 1, 2))
    for one, other in zip(masked(Q, K, V), expected(Q, K, V), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "form"),
    [
        ("gpu", jnp.bfloat16, "cuDNN's kernel"),
        ("tpu", jnp.bfloat16, "Pallas splash kernel"),
        ("tpu", jnp.float32, "by XLA, in tiles"),
        ("cpu", jnp.bfloat16, "by XLA, in tiles"),
    ],
)
def test_the_form_in_words(platform, dtype, form, monkeypatch):
    here = [types.SimpleNamespace(platform=platform)]
    monkeypatch.setattr("fact_jax.ops.attention_kernels._installed", lambda *modules: True)
    monkeypatch.setattr(jax, "local_devices", lambda: here)
    assert attention_form(dtype) == form
