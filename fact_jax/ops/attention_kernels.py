"""Fused attention kernels: cuDNN's on NVIDIA GPUs, Pallas splash attention on TPUs.

Neither writes the (queries x keys) matrix to memory (FlashAttention, Dao et al. 2022, arXiv
2205.14135), in the forward pass or in the backward pass. Both keep the logarithm of the softmax's
sum for each query as the only residual besides inputs and output.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from fact_jax.mesh import BATCH_AXES, TENSOR_AXIS

_FAR = 2.0**15
"""Taken off the unscaled score of a hidden key: far more than scores differ by, and a float16."""
_LANES, _SUBLANES = 128, 16
"""A tile of 16-bit numbers on a TPU: lengths are whole lanes, heads whole sublanes."""
_WIDE_HEAD = 256
"""Wider heads (the autoencoder's are 512) take smaller tiles, to fit beside them on the chip."""
_KEYS_ON_CHIP = 4352
"""Keys of up to 128 numbers that lie on the chip at once, backwards with their gradients."""
_SCORES = 512 * _KEYS_ON_CHIP
"""Scores of a tile of queries with all keys on the chip; backwards half as many."""


class HiddenKeys(NamedTuple):
    """Keys that queries do not see: in any of g groups, its ``keys`` from its ``queries``.

    A mask of this kind costs a kernel g more numbers a query and a key; at least one key must be
    left to every query.
    """

    queries: Bool[Array, "#b #n g"]
    keys: Bool[Array, "#b m g"]

    def joined(self, other: "HiddenKeys") -> "HiddenKeys":
        """What either hides."""

        def both(one, more):
            rows = jnp.broadcast_shapes(one.shape[:2], more.shape[:2])
            return jnp.concatenate(
                [jnp.broadcast_to(a, (*rows, a.shape[-1])) for a in (one, more)], axis=-1
            )

        return HiddenKeys(both(self.queries, other.queries), both(self.keys, other.keys))

    def visible(self) -> Bool[Array, "#b #n m"]:
        """The whole mask: which keys each query sees."""
        return ~jnp.einsum("bng,bmg->bnm", self.queries, self.keys)


Kernel = Callable[..., Float[Array, "b n h d"]]
"""Called as ``kernel(q, k, v, hidden)``; the softmax's scale is 1/sqrt(d)."""


def installed_kernels(q: Float[Array, "b n h d"]) -> dict[str, Kernel]:
    """The kernels that take such heads, by JAX platform, where its compiler is installed.

    They take 16-bit numbers only: float32 is computed in float32, by XLA.
    """
    kernels: dict[str, Kernel] = {}
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not _divides(q):
        return kernels
    if _installed("jax_cuda12_plugin", "jax_cuda13_plugin") and q.shape[-1] <= _widest_on_cuda():
        kernels["cuda"] = attention_cudnn
    if _installed("libtpu"):
        kernels["tpu"] = attention_splash
    return kernels


@functools.cache
def _installed(*modules: str) -> bool:
    return any(importlib.util.find_spec(module) for module in modules)


def _widest_on_cuda() -> int:
    """Largest head width of cuDNN's kernel: by the GPU that is here, or else the smaller one."""
    if jax.default_backend() != "gpu":
        return 128
    capability = float(jax.local_devices()[0].compute_capability)
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def _split_axes() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Axes of the mesh, if there is one, over which the compiler splits samples and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    return (
        tuple(axis for axis in BATCH_AXES if axis in automatic),
        tuple(axis for axis in (TENSOR_AXIS,) if axis in automatic),
    )


def _divides(q: Float[Array, "b n h d"]) -> bool:
    """Whether samples and heads come out even over these axes."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return all(
        q.shape[dimension] % math.prod(sizes[axis] for axis in axes) == 0
        for dimension, axes in zip((0, 2), _split_axes(), strict=True)
    )


def _on_devices(
    kernel: Callable[..., Float[Array, "b n h d"]],
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
) -> Float[Array, "b n h d"]:
    """``kernel(q, k, v)``, each device on its own samples and heads."""
    samples, heads = _split_axes()
    if samples or heads:  # also over axes of one device: kernels have no automatic form
        spec = P(samples, None, heads)
        kernel = jax.shard_map(
            kernel,
            in_specs=(spec,) * 3,
            out_specs=spec,
            axis_names={*samples, *heads},
            check_vma=False,
        )
    return kernel(q, k, v)


def attention_cudnn(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    hidden: HiddenKeys | None = None,
) -> Float[Array, "b n h d"]:
    """cuDNN's flash attention, float16 or bfloat16."""
    keys, width = k.shape[1], k.shape[-1]
    q, k = _with_groups(q, k, hidden)
    wide, padded = (-(-size // 8) * 8 for size in (q.shape[-1], keys))

    def on_device(q, k, v):
        lengths = None if padded == keys else jnp.full(len(k), keys, jnp.int32)
        return jax.nn.dot_product_attention(
            q, k, v, scale=width**-0.5, key_value_seq_lengths=lengths, implementation="cudnn"
        )

    rows = _padded(q, q.shape[1], wide), _padded(k, padded, wide), _padded(v, padded, wide)
    return _on_devices(on_device, *rows)[..., :width]


def attention_splash(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    hidden: HiddenKeys | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "b n h d"]:
    """Splash attention.

    Keys that fill up the last tile are one more group of hidden keys. ``interpret`` runs it on any
    platform, slowly.
    """
    n, m, width = q.shape[1], k.shape[1], q.shape[-1]
    groups = 0 if hidden is None else hidden.queries.shape[-1]
    filled = splash_tiles(n, m, width).keys > m  # which takes a group
    tiles = splash_tiles(n, m, _whole_sublanes(width + groups + filled))
    queries, keys = tiles.queries, tiles.keys
    scale = width**-0.5
    if keys > m:
        fill = HiddenKeys(jnp.ones((1, 1, 1), bool), (jnp.arange(keys) >= m)[None, :, None])
        if hidden is not None:
            there = jnp.pad(hidden.keys, ((0, 0), (0, keys - m), (0, 0)))
            fill = HiddenKeys(hidden.queries, there).joined(fill)
        hidden = fill
    q, k = _with_groups(q * scale, _padded(k, keys, width), hidden)
    wide = _whole_sublanes(q.shape[-1])
    on_device = functools.partial(_splash, tiles=tiles, interpret=interpret)
    rows = _padded(q, queries, wide), _padded(k, keys, wide), _padded(v, keys, wide)
    return _on_devices(on_device, *rows)[:, :n, :, :width]


def _splash(q, k, v, *, tiles: "SplashTiles", interpret: bool):
    # Here, because it imports what takes a second and is of no use without a TPU.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # Heads of 40 would be filled up to 128 numbers in memory; sequences are whole lanes anyhow.
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([splash.FullMask((tiles.queries, tiles.keys))] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash.BlockSizes(
            block_q=tiles.forward,
            block_kv=tiles.on_chip,
            block_kv_compute=tiles.key_tile,
            block_q_dkv=tiles.backward,
            block_kv_dkv=tiles.on_chip,
            block_kv_dkv_compute=tiles.key_tile,
            use_fused_bwd_kernel=True,
            **layouts,
        ),
        interpret=interpret,
    )
    return jax.vmap(kernel)(*(a.swapaxes(1, 2) for a in (q, k, v))).swapaxes(1, 2)


class SplashTiles(NamedTuple):
    """Padded numbers of queries and keys, queries of a tile forwards and backwards, keys that lie
    on the chip at once, and keys of a tile of scores.

    Keys are read for each tile of queries unless all of them lie on the chip; backwards, queries
    are read for each part of the keys.
    """

    queries: int
    keys: int
    forward: int
    backward: int
    on_chip: int
    key_tile: int


def splash_tiles(n: int, m: int, head_dim: int) -> SplashTiles:
    """Tiles for n queries and m keys; ``head_dim`` is that of the kernel, whole sublanes.

    By what was compiled for v5e, v5p and v6e. What is padded already has the same tiles.
    """
    wide = head_dim > _WIDE_HEAD
    most = 0 if wide else _KEYS_ON_CHIP // (-(-head_dim // _LANES))

    def on_chip(keys: int, tile: int) -> int:
        return max(b for b in _parts(keys, tile) if b == tile or b <= most)

    # A part of the keys costs about as much memory traffic as 128 more keys cost arithmetic.
    keys, key_tile = min(
        _tilings(m, 512 if wide else 1408),
        key=lambda found: (found[0] + _LANES * (found[0] // on_chip(*found)), -found[1]),
    )
    part = on_chip(keys, key_tile)
    limit = min(512 if wide else 640, _SCORES // part // _LANES * _LANES)
    queries, forward = min(_tilings(n, limit), key=lambda found: (found[0], -found[1]))
    backward = max(b for b in _parts(forward, _LANES) if b * part <= _SCORES // 2)
    return SplashTiles(queries, keys, forward, backward, part, key_tile)


def _parts(length: int, unit: int) -> list[int]:
    """Multiples of the unit that divide the length."""
    return [part for part in range(unit, length + 1, unit) if length % part == 0]


def _tilings(length: int, most: int) -> list[tuple[int, int]]:
    """(padded length, tile) of equal tiles of whole lanes up to ``most``, from the fewest on."""
    fewest = -(-length // most)
    tiles = [-(-length // (count * _LANES)) * _LANES for count in range(fewest, fewest + 6)]
    return [(-(-length // tile) * tile, tile) for tile in tiles]


def _whole_sublanes(head_dim: int) -> int:
    return -(-head_dim // _SUBLANES) * _SUBLANES


def _padded(a: Float[Array, "b n h d"], length: int, width: int) -> Float[Array, "b _ h _"]:
    return jnp.pad(a, ((0, 0), (0, length - a.shape[1]), (0, 0), (0, width - a.shape[-1])))


def _with_groups(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], hidden: HiddenKeys | None
) -> tuple[Float[Array, "b n h _"], Float[Array, "b m h _"]]:
    """A dimension more for each group, in which its queries and keys are far apart."""
    if hidden is None:
        return q, k
    far = jnp.where(hidden.keys, -_FAR, 0)

    def beside(a, groups):
        groups = jnp.broadcast_to(groups[:, :, None], (*a.shape[:3], groups.shape[-1]))
        return jnp.concatenate([a, groups.astype(a.dtype)], axis=-1)

    return beside(q, hidden.queries), beside(k, far)
