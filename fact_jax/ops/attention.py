"""Softmax attention, by the algorithm that suits the sequence length and platform.

The plain form materialises the (queries x keys) matrix and is best for short sequences. The tiled
forms loop over chunks of queries and recompute each chunk in the backward pass, so that memory is
linear in the sequence length (Rabe & Staats 2021, arXiv 2112.05682): one head at a time, which is
twice as fast on a CPU, or all heads and samples at once, which keeps the sharding of batch and
heads. Where an accelerator has a fused kernel that takes the numbers, that is used instead
(:mod:`fact_jax.ops.attention_kernels`).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from fact_jax.ops.attention_kernels import (
    HiddenKeys,
    attention_cudnn,
    attention_splash,
    installed_kernels,
)

PLAIN_MATRIX_LIMIT, PLAIN_MATRIX_LIMIT_CPU = 1024 * 1280, 512 * 1024
"""Largest queries x keys matrix a head may materialise before a tiled form takes over."""
KEPT_MATRIX_LIMIT = 256 * 384
"""Largest one that is kept for the backward pass; larger ones are computed again there."""
TILE, QUERY_CHUNK = 512, 128


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    hidden: HiddenKeys | None = None,
) -> Float[Array, "b n h d"]:
    """Softmax attention with scale 1/sqrt(d); softmax in float32, result in the dtype of ``v``.

    A query sees at least one key that is not ``hidden`` from it.
    """
    mask = None if hidden is None else hidden.visible()
    if q.shape[1] * k.shape[1] <= KEPT_MATRIX_LIMIT:
        return attention_plain(q, k, v, mask)
    kernels = installed_kernels(q)
    if not kernels:
        return _recomputed(q, k, v, mask)

    def unfused(q, k, v, hidden):
        return _recomputed(q, k, v, mask)

    return lax.platform_dependent(q, k, v, hidden, default=unfused, **kernels)


def attention_form(dtype: DTypeLike) -> str:
    """How attention of long sequences of such numbers is computed on this platform, in words."""
    heads = jnp.zeros((1, 1, 8, 40), dtype)
    platform = jax.local_devices()[0].platform
    kernel = installed_kernels(heads).get("cuda" if platform == "gpu" else platform)
    names = {attention_cudnn: "cuDNN's kernel", attention_splash: "Pallas splash kernel"}
    return names[kernel] if kernel else "by XLA, in tiles"


def attention_plain(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "#b #n m"] | None = None,
) -> Float[Array, "b n h d"]:
    """The definition, with the whole matrix in memory."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * scale, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def attention_tiled(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "#b #n m"] | None = None,
    tile: int = TILE,
) -> Float[Array, "b n h d"]:
    """The same numbers (up to rounding) with a ``tile`` x m matrix in memory at a time."""
    b, n, h, d = q.shape
    tile = min(tile, n)
    tiles = -(-n // tile)
    q = jnp.pad(q * d**-0.5, ((0, 0), (0, tiles * tile - n), (0, 0), (0, 0)))
    queries = q.transpose(0, 2, 1, 3).reshape(b * h, tiles, tile, d)
    keys = k.transpose(0, 2, 3, 1).reshape(b * h, d, -1)
    values = v.transpose(0, 2, 1, 3).reshape(b * h, -1, d)
    if mask is not None:
        mask = _tiled(mask, tile, tiles, b)

    @jax.checkpoint
    def one_tile(q_tile, keys, values, seen):
        scores = jnp.matmul(q_tile, keys, preferred_element_type=jnp.float32)
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(values.dtype)

    def one_head(head):
        index, q_tiles, keys, values = head
        # All heads of a sample look through one mask.
        seen = None if mask is None else mask[index // h]
        return lax.map(lambda row: one_tile(row[0], keys, values, row[1]), (q_tiles, seen))

    out = lax.map(one_head, (jnp.arange(b * h), queries, keys, values))
    return out.reshape(b, h, tiles * tile, d)[:, :, :n].transpose(0, 2, 1, 3)


def attention_query_chunked(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    mask: Bool[Array, "#b #n m"] | None = None,
    tile: int = QUERY_CHUNK,
) -> Float[Array, "b n h d"]:
    """The same numbers, one chunk of queries of all heads and samples at a time."""
    b, n, h, d = q.shape
    tile = min(tile, n)
    tiles = -(-n // tile)
    q = jnp.pad(q, ((0, 0), (0, tiles * tile - n), (0, 0), (0, 0)))
    queries = q.reshape(b, tiles, tile, h, d).swapaxes(0, 1)
    if mask is not None:
        mask = _tiled(mask, tile, tiles, b).swapaxes(0, 1)
    one_tile = jax.checkpoint(attention_plain)
    out = lax.map(lambda row: one_tile(row[0], k, v, row[1]), (queries, mask))
    return out.swapaxes(0, 1).reshape(b, tiles * tile, h, d)[:, :n]


def _tiled(mask: Bool[Array, "c n m"], tile: int, tiles: int, b: int) -> Bool[Array, "b t i m"]:
    """The mask's rows by tiles; the rows that fill up the last one see everything."""
    n, m = mask.shape[1:]
    if n == 1:  # one row for all queries
        return jnp.broadcast_to(mask[:, None], (b, tiles, 1, m))
    padded = jnp.pad(mask, ((0, 0), (0, tiles * tile - n), (0, 0)), constant_values=True)
    return jnp.broadcast_to(padded.reshape(-1, tiles, tile, m), (b, tiles, tile, m))


@jax.custom_vjp
def _recomputed(q, k, v, mask):
    """Attention whose backward pass keeps only the inputs and recomputes the rest."""
    return _by_platform(lambda form: form)(q, k, v, mask)


def _forward(q, k, v, mask):
    return _recomputed(q, k, v, mask), (q, k, v, mask)


def _backward(saved, g):
    # By hand: lax.platform_dependent would keep the intermediates of both forms.
    def gradient(form):
        return lambda q, k, v, mask, g: jax.vjp(lambda *qkv: form(*qkv, mask), q, k, v)[1](g)

    saved, g = lax.optimization_barrier((saved, g))  # recompute no earlier than needed
    return *_by_platform(gradient)(*saved, g), None


def _by_platform(of):
    """``of(form)`` with the form for this size and platform, chosen at compile time."""

    def call(q, k, *rest):
        size = q.shape[1] * k.shape[1]
        cpu = attention_plain if size <= PLAIN_MATRIX_LIMIT_CPU else attention_tiled
        default = attention_plain if size <= PLAIN_MATRIX_LIMIT else attention_query_chunked
        if cpu is default:
            return of(default)(q, k, *rest)
        return lax.platform_dependent(q, k, *rest, cpu=of(cpu), default=of(default))

    return call


_recomputed.defvjp(_forward, _backward)
