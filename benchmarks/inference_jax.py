"""The JAX side: a call of our UNet with a face, compiled."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fact_convert.io.json_io import read_json
from fact_jax.models.unet import UNet, UNetConfig


def unet_config(name: str) -> UNetConfig:
    """Of the miniature that the repository holds, or Stable Diffusion 1.5's."""
    if name == "mini":
        return UNetConfig.from_dict(read_json("miniature/base/unet/config.json"))
    return UNetConfig.sd15()


def measure(size, arguments) -> dict:
    """Seconds of each timed call."""
    dtype = jnp.dtype(arguments.dtype)
    config = dataclasses.replace(unet_config(size.unet), face_dim=size.face_dim)
    graph, abstract = nnx.split(nnx.eval_shape(lambda: UNet(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    state = jax.tree_util.tree_map_with_path(
        lambda path, leaf: _weight(path, leaf.shape, rng, dtype), nnx.as_pure(abstract)
    )

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    batch, t = arguments.batch, jnp.asarray(500)
    x = draw(batch, size.cells, size.cells, config.in_channels)
    text = draw(batch, size.words, config.cross_attention_dim)
    keys = jax.jit(lambda state, face: nnx.merge(graph, state).face_keys(face))(
        state, draw(batch, size.face_tokens, size.face_dim)
    )
    call = jax.jit(lambda state, x, keys: nnx.merge(graph, state)(x, t, text, face=keys))
    call(state, x, keys).block_until_ready()
    times = []
    for _ in range(arguments.runs):
        start = time.perf_counter()
        out = call(state, x, keys).block_until_ready()
        times.append(time.perf_counter() - start)
    if not bool(jnp.isfinite(out).all()):
        raise SystemExit("error: the UNet's output is not finite")
    return {"jax": times}


def _weight(path, shape: tuple[int, ...], rng: np.random.Generator, dtype) -> jax.Array:
    name = str(getattr(path[-1], "key", path[-1]))
    if name == "kernel":
        array = rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1]))
    else:
        array = np.full(shape, {"scale": 1.0, "bias": 0.0}.get(name, 0.5), np.float32)
    return jnp.asarray(array, dtype)
