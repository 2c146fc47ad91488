"""The attention operation. Every model calls :func:`attention`; how it is computed is decided here.

The plain form materialises the (queries x keys) matrix and is best for short sequences. The tiled
form walks over blocks of queries and recomputes each block in the backward pass, so that memory
stays linear in the sequence (the idea of Rabe & Staats 2021, arXiv 2112.05682).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

PLAIN_MATRIX_LIMIT = 1024 * 1280
"""Largest queries x keys matrix a head may materialise before the tiled form takes over."""
TILE = 512


def attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Softmax attention with scale 1/sqrt(d); softmax in float32, result in the dtype of ``v``."""
    n, m = q.shape[1], k.shape[1]
    if n * m <= PLAIN_MATRIX_LIMIT:
        return attention_plain(q, k, v)
    return attention_tiled(q, k, v)


def attention_plain(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """The definition, with the whole matrix in memory."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bnhd,bmhd->bhnm", q * scale, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def attention_tiled(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
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

    @jax.checkpoint
    def one_tile(q_tile, keys, values):
        scores = jnp.matmul(q_tile, keys, preferred_element_type=jnp.float32)
        weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.matmul(weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (mixed / total).astype(values.dtype)

    def one_head(head):
        q_tiles, keys, values = head
        return lax.map(lambda q_tile: one_tile(q_tile, keys, values), q_tiles)

    out = lax.map(one_head, (queries, keys, values))
    return out.reshape(b, h, tiles * tile, d)[:, :, :n].transpose(0, 2, 1, 3)
