"""Sizes, FLOPs, memory and collectives of one training step, in a process of its own."""

import math
import sys
import time

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from fact_jax.plan.compilation import serve_request
from fact_jax.plan.compiled_program import compile_program, target_devices
from fact_jax.plan.targets import Target
from fact_jax.sharding import batch_sharding, make_mesh
from fact_train.config import TrainConfig, load_config
from fact_train.engine.state import make_optimizer, state_shardings
from fact_train.engine.step import TrainStep, frozen_shardings
from fact_train.overrides import override
from fact_train.plan.abstract_task import AbstractStep, build, watched_flops
from fact_train.plan.report import CompiledStats


def read_compiled(config: TrainConfig, target: Target) -> CompiledStats:
    """Stats of the step compiled for devices that are not here."""
    mesh = make_mesh(config.mesh, target_devices(target))
    built = build(config)
    step, arguments = _train_step(built, mesh), (built.state, built.frozen, built.batch)
    stats = _stats(built, mesh)
    stats["flops"] = step.executed_flops(*arguments)
    stats["model_flops"] = step.model_flops(*arguments)
    if config.log.samples_every:
        stats["watched_flops"] = watched_flops(built.config, mesh.size)
    start = time.monotonic()
    program = compile_program(step.lower(*arguments))
    for name in ("usable", "accessed", "kernels", "collectives"):
        stats[name] = getattr(program, name)
    stats["bytes"]["temporary"] = program.used - sum(stats["bytes"].values())
    stats["seconds"] = time.monotonic() - start
    return stats


def _train_step(built: AbstractStep, mesh: Mesh) -> TrainStep:
    return TrainStep(built.task, make_optimizer(built.config.optimizer), built.config, mesh)


def _stats(built: AbstractStep, mesh: Mesh) -> CompiledStats:
    """What the arrays alone say: bytes on one device, and what they are bytes of."""
    state = state_shardings(built.state, mesh)
    return {
        "notes": list(built.notes),
        "parameters": {"frozen": _count(built.frozen), "trainable": _count(built.state.params)},
        "bytes": {
            "frozen": _share(built.frozen, frozen_shardings(built.frozen, built.config, mesh)),
            "trainable": _share(built.state.params, state.params),
            "optimizer": _share(built.state.opt_state, state.opt_state),
            "ema": _share(built.state.ema, state.ema),
            "batch": _share(built.batch, dict.fromkeys(built.batch, batch_sharding(mesh))),
        },
        "flops": 0,
        "model_flops": 0,
        "watched_flops": None,
        "usable": None,
        "accessed": None,
        "kernels": None,
        "collectives": None,
        "seconds": 0.0,
    }


def _share(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of a tree on one device."""
    sizes = jax.tree.map(
        lambda leaf, place: math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(sizes))


def _count(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def respond(request: tuple[str, list[str]], target: Target) -> CompiledStats:
    """Stats for a request: configuration, overrides."""
    name, overrides = request
    return read_compiled(override(load_config(name)[1], overrides), target)


if __name__ == "__main__":
    serve_request(respond, *sys.argv[1:])
