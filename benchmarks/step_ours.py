"""The step that `fact-train` runs, on random weights."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import random_tree
from benchmarks.step import Side
from fact_jax.curriculum import Stage
from fact_jax.models.resampler import ResamplerConfig
from fact_jax.plan.chips import chip_of, per_device
from fact_jax.sharding import make_mesh
from fact_train.config import EMAConfig, TrainConfig
from fact_train.engine.state import make_optimizer, place_state
from fact_train.engine.step import TrainStep
from fact_train.plan.abstract_task import build
from fact_train.tasks.adapter import AdapterOptions


def make_config(size, arguments: argparse.Namespace) -> TrainConfig:
    """The whole recipe but the running average, which PyTorch's side has not."""
    mini = size.base.startswith("miniature")
    return TrainConfig(
        task="adapter",
        steps=1000,
        batch_size=arguments.batch,
        precision=arguments.precision,
        remat=arguments.remat,
        ema=EMAConfig(decay=0.0),
        options=AdapterOptions(
            base=size.base,
            encoder=size.encoder,
            resampler=ResamplerConfig.mini() if mini else ResamplerConfig.sd15(),
            stages=(Stage(steps=1000, shuffle=(0.5, 0.5), fair_weight=(0.01, 0.01)),),
        ),
    )


def make(size, arguments: argparse.Namespace) -> Side:
    config = make_config(size, arguments)
    built, device = build(config), jax.devices()[0]
    optimizer, mesh = make_optimizer(config.optimizer), make_mesh(config.mesh, [device])
    rng = np.random.default_rng(0)
    params, frozen = (
        jax.tree.map(jnp.asarray, random_tree(tree, rng))
        for tree in (built.state.params, built.frozen)
    )
    state = place_state(params, optimizer, config.ema, mesh)
    del params
    data = {name: _data(name, leaf, size.cells, rng) for name, leaf in built.batch.items()}
    train_step = TrainStep(built.task, optimizer, config, mesh)
    flops, chip = train_step.model_flops(state, frozen, data), chip_of(device.device_kind)

    def step() -> float:
        nonlocal state
        state, metrics = train_step(state, frozen, data)
        return float(metrics["loss"])

    return Side(
        step=step,
        trainable=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        device_bytes=device_bytes,
        model_flops=flops,
        peak=per_device(chip).peak if chip else None,
    )


def device_bytes() -> int | None:
    """The most memory of the first device that was in use; None on a CPU."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def _data(name: str, leaf, cells: int, rng: np.random.Generator) -> jax.Array:
    if name == "ids":
        return jnp.ones(leaf.shape, leaf.dtype)
    shape = leaf.shape
    if name in ("latents", "mask"):
        shape = (shape[0], cells, cells, *shape[3:])
    array = rng.standard_normal(shape, np.float32)
    return jnp.asarray(array > 0 if name == "mask" else array, leaf.dtype)
