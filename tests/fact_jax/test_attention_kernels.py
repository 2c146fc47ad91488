"""The accelerators' kernels against the plain form: splash attention interpreted, cuDNN by XLA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.ops import attention_kernels as kernels
from fact_jax.ops.attention import attention, attention_plain
from fact_jax.ops.attention_kernels import (
    HiddenKeys,
    attention_cudnn,
    attention_splash,
    splash_tiles,
)
from tests.fact_jax.tiny import normal

pytestmark = pytest.mark.heavy


def hidden_keys(b: int, n: int, m: int, people: int) -> HiddenKeys:
    """Each of ``people`` owns eight of the last keys; a query sees those of some, or of none."""
    keys = np.zeros((1, m, people), bool)
    for person in range(people):
        keys[:, m - 8 * (person + 1) : m - 8 * person, person] = True
    seen = np.random.default_rng(0).random((b, n, people)) < 0.5
    return HiddenKeys(jnp.asarray(~seen), jnp.asarray(keys))


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """cuDNN's place taken by XLA: what it is given is tested, not what it computes."""
    real = jax.nn.dot_product_attention

    def by_xla(*arrays, implementation, **options):
        assert implementation == "cudnn"
        assert all(a.shape[-1] % 8 == 0 for a in arrays)
        assert arrays[1].shape[1] % 8 == 0
        return real(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


def value_and_gradients(form, *arrays):
    weights = normal(9, *arrays[0].shape)

    def loss(*arrays):
        return (form(*arrays).astype(jnp.float32) * weights).sum()

    out = jax.jit(form)(*arrays)
    return out, *jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)


def check(form, n, m, heads, width, people, dtype):
    q, k, v = (normal(i, 2, rows, heads, width).astype(dtype) for i, rows in enumerate((n, m, m)))
    hidden = hidden_keys(2, n, m, people) if people else None
    ours = value_and_gradients(lambda *a: form(*a, hidden), q, k, v)
    mask = None if hidden is None else hidden.visible()
    exact = (a.astype(jnp.float32) for a in (q, k, v))
    plain = value_and_gradients(lambda *a: attention_plain(*a, mask), *exact)
    # bfloat16 has eight bits of mantissa.
    most = 1e-5 if dtype == jnp.float32 else 1e-2
    for one, other in zip(ours, plain, strict=True):
        assert one.dtype == dtype
        error = np.linalg.norm(np.float64(one.astype(jnp.float32)) - np.float64(other))
        assert error <= most * np.linalg.norm(np.float64(other))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "width", "people"),
    [
        (130, 146, 40, 2),  # queries, keys and a head that fill no whole tile
        (300, 1500, 40, 2),  # two tiles of keys on the chip at once
        (130, 4500, 40, 0),  # four tiles of keys, two of them at once
    ],
)
def test_splash_is_plain(n, m, width, people, dtype):
    check(functools.partial(attention_splash, interpret=True), n, m, 1, width, people, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("n", "width"), [(4096, 40), (1024, 80), (256, 160), (64, 160)]
)  # the UNet's levels
@pytest.mark.parametrize("faces", [16, 32, 48, None])
def test_splash_is_plain_at_full_size(n, width, faces, dtype):
    """Visual tokens and the face tokens of one to three people, or the 77 tokens of a text."""
    people, keys = (faces // 16, n + faces) if faces else (0, 77)
    check(functools.partial(attention_splash, interpret=True), n, keys, 1, width, people, dtype)


@pytest.mark.parametrize(("m", "people"), [(26, 2), (77, 0), (16, 0)])
def test_what_cudnn_is_given(cudnn_by_xla, m, people):
    check(attention_cudnn, 24, m, 2, 40, people, jnp.float32)


def test_hidden_keys_as_a_mask():
    """By hand: the second query sees no key of the first group, and neither sees the last key."""
    queries = jnp.array([[[False], [True]]])
    keys = jnp.array([[[True], [False], [True], [False]]])
    nobody = HiddenKeys(jnp.ones((1, 1, 1), bool), jnp.array([[[False], [False], [False], [True]]]))
    both = HiddenKeys(queries, keys).joined(nobody)
    expected = [[[True, True, True, False], [False, True, False, False]]]
    np.testing.assert_array_equal(both.visible(), expected)


def test_a_kernel_takes_16_bits_where_it_is_installed(monkeypatch):
    half, full = jnp.zeros((1, 8, 2, 40), jnp.bfloat16), jnp.zeros((1, 8, 2, 40))
    monkeypatch.setattr(kernels, "_installed", lambda *modules: True)
    assert set(kernels.installed_kernels(half)) == {"cuda", "tpu"}
    assert not kernels.installed_kernels(full)
    # cuDNN takes wider heads on newer GPUs only.
    wide = jnp.zeros((1, 8, 2, 160), jnp.bfloat16)
    assert set(kernels.installed_kernels(wide)) == {"tpu"}
    monkeypatch.setattr(kernels, "_installed", lambda *modules: False)
    assert not kernels.installed_kernels(half)


def test_the_platform_decides(monkeypatch):
    """On a CPU the unfused form is computed, though a kernel is installed for another platform."""
    monkeypatch.setattr("fact_jax.ops.attention.KEPT_MATRIX_LIMIT", 0)
    q, k = normal(1, 1, 12, 2, 8).astype(jnp.bfloat16), normal(2, 1, 9, 2, 8).astype(jnp.bfloat16)
    expected = jax.jit(attention)(q, k, k)

    def kernel(q, k, v, hidden):
        return jnp.full_like(q, jnp.nan)

    monkeypatch.setattr("fact_jax.ops.attention.installed_kernels", lambda q: {"tpu": kernel})
    np.testing.assert_array_equal(jax.jit(lambda *a: attention(*a))(q, k, k), expected)


@pytest.mark.parametrize("head_dim", [48, 80, 128, 144, 272, 512])
def test_tiles_fill_what_they_are_of(head_dim):
    """And what they have padded has the same ones: the plan reads them from compiled programs."""
    for n, m in np.random.default_rng(0).integers(1, 20000, (200, 2)).tolist():
        tiles = splash_tiles(n, m, head_dim)
        assert tiles.queries >= n
        assert tiles.keys >= m
        assert tiles.queries % tiles.forward == tiles.queries % tiles.backward == 0
        assert tiles.keys % tiles.on_chip == tiles.on_chip % tiles.key_tile == 0
        assert splash_tiles(tiles.queries, tiles.keys, head_dim) == tiles
