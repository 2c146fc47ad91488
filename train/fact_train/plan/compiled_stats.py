"""Sizes, FLOPs, memory and collectives of one training step.

`python -m fact_train.plan.compiled_stats REQUEST FILE` writes them as JSON; the request is JSON
too: configuration, overrides, target.
"""

import json
import math
import os
import re
import sys
import threading
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh
from jaxtyping import PyTree

from fact_jax.sharding import batch_sharding, make_mesh
from fact_jax.utils.errors import UserError, first_line
from fact_train.config import TrainConfig, load_config
from fact_train.engine.jaxpr_costs import count_flops, trace
from fact_train.engine.state import make_optimizer, state_shardings
from fact_train.engine.step import TrainStep, frozen_shardings
from fact_train.overrides import override
from fact_train.plan.abstract_task import AbstractStep, build
from fact_train.plan.compilation import CompiledStats
from fact_train.plan.hbm_traffic import hbm_bytes
from fact_train.plan.hlo import read_collectives, read_kernels, summarize
from fact_train.plan.targets import Target

# What the compiler says of a program that is too large.
_OVERFLOW = re.compile(
    r"(?:\(|Used )([\d.]+)([KMGT]?)(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT]?)(?:\)| hbm)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_compiled(config: TrainConfig, target: Target) -> CompiledStats:
    """Stats of the step compiled for devices that are not here."""
    try:
        topology = topologies.get_topology_desc(platform=target.platform, **target.options)
    except Exception as error:  # the compiler's own words, of no class that could be told apart
        raise UserError(f"cannot compile for {target.name}: {first_line(error)}") from error
    mesh = make_mesh(config.mesh, list(topology.devices))
    built = build(config)
    step, arguments = _train_step(built, mesh), (built.state, built.frozen, built.batch)
    stats = _stats(built, mesh)
    stats["flops"] = count_flops(trace(step.compute, *arguments), target.platform)
    stats["model_flops"] = step.model_flops(*arguments)
    start = time.monotonic()
    lowered = step.lower(*arguments)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used, stats["usable"] = read_overflow(str(error))
    else:
        memory = compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        used = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
        text = compiled.as_text()
        stats["accessed"] = hbm_bytes(text)
        stats["kernels"] = read_kernels(text)
        stats["collectives"] = summarize(read_collectives(text))
    stats["bytes"]["temporary"] = used - sum(stats["bytes"].values())
    stats["seconds"] = time.monotonic() - start
    return stats


def read_overflow(message: str) -> tuple[float, float]:
    """Bytes used and usable, from the compiler's complaint that memory does not suffice."""
    match = _OVERFLOW.search(message)
    if match is None:
        raise RuntimeError(f"the step does not compile: {message}")
    used, usable = (
        float(number) * _UNITS[unit] for number, unit in (match.groups()[:2], match.groups()[2:])
    )
    return used, usable


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


def main(request: str, file: str) -> None:
    """The process that :func:`fact_train.plan.compilation.compiled_stats` starts."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    name, overrides, target = json.loads(request)
    try:
        config = override(load_config(name)[1], overrides)
        stats = read_compiled(config, Target(**target))
        text = json.dumps(stats)
    except UserError as error:
        text = json.dumps({"error": str(error)})
    Path(file).write_text(text)


def _end_with_parent() -> None:
    sys.stdin.read()  # ends when the other end is closed, however the parent ended
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
