"""The step that `fact-train` runs, on random weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fact_jax.curriculum import Stage
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.sharding import make_mesh
from fact_train.config import EMAConfig, TrainConfig
from fact_train.engine.state import make_optimizer, path_name, place_state
from fact_train.engine.step import TrainStep
from fact_train.plan.abstract_task import build
from fact_train.tasks.adapter import AdapterOptions


def make_config(size, batch: int, remat: str) -> TrainConfig:
    """The whole recipe but the running average, which PyTorch's side has not."""
    mini = size.base.startswith("miniature")
    return TrainConfig(
        task="adapter",
        steps=1000,
        batch_size=batch,
        remat=remat,
        ema=EMAConfig(decay=0.0),
        options=AdapterOptions(
            base=size.base,
            encoder=size.encoder,
            resampler=ResamplerConfig.mini() if mini else ResamplerConfig.sd15(),
            stages=(Stage(steps=1000, shuffle=(0.5, 0.5), fair_weight=(0.01, 0.01)),),
        ),
    )


def make(size, batch: int, remat: str) -> tuple[Callable[[], float], int]:
    """(a step that returns its loss, how many numbers are trained)."""
    config = make_config(size, batch, remat)
    built = build(config)
    optimizer, mesh = make_optimizer(config.optimizer), make_mesh(config.mesh, jax.devices()[:1])
    rng = np.random.default_rng(0)
    params, frozen = (_random(tree, rng) for tree in (built.state.params, built.frozen))
    state = place_state(params, optimizer, config.ema, mesh)
    del params
    data = {name: _data(name, leaf, size.cells, rng) for name, leaf in built.batch.items()}
    train_step = TrainStep(built.task, optimizer, config, mesh)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, data)
        return float(metrics["loss"])

    return step, sum(leaf.size for leaf in jax.tree.leaves(state.params))


def _random(tree, rng: np.random.Generator):
    """Weights of unit gain, so that no number grows or dies on its way."""

    def one(path, leaf):
        name = path_name(path).rsplit("/", 1)[-1]
        if name in ("kernel", "embedding", "latents", "pos_embed"):
            fan = np.prod(leaf.shape[:-1]) if name == "kernel" else leaf.shape[-1]
            array = rng.standard_normal(leaf.shape, np.float32)
            array /= np.sqrt(fan, dtype=np.float32)
        else:
            array = np.full(leaf.shape, 0.5 if name.startswith("alpha") else name == "scale")
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def _data(name: str, leaf, cells: int, rng: np.random.Generator) -> jax.Array:
    if name == "ids":
        return jnp.ones(leaf.shape, leaf.dtype)
    shape = leaf.shape
    if name in ("latents", "mask"):
        shape = (shape[0], cells, cells, *shape[3:])
    array = rng.standard_normal(shape, np.float32)
    return jnp.asarray(array > 0 if name == "mask" else array, leaf.dtype)
