"""What is read from one training step: sizes, arithmetic, memory and collectives."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from fact_jax.mesh import MeshConfig
from fact_jax.sharding import batch_sharding, batch_ways, make_mesh
from fact_jax.utils.errors import UserError
from fact_train.config import TrainConfig
from fact_train.engine.jaxpr_costs import count_flops, peak_bytes, trace
from fact_train.engine.model_flops import model_flops
from fact_train.engine.state import make_optimizer, state_shardings
from fact_train.engine.step import TrainStep, check_batch, frozen_shardings, make_train_step
from fact_train.plan.abstract_task import Abstract, batch_shapes, build
from fact_train.plan.hbm_traffic import hbm_bytes
from fact_train.plan.hlo import read_collectives, summarize

PyTree = Any
Facts = dict[str, Any]
# What the compiler says of a program that is too large.
_OVERFLOW = re.compile(
    r"(?:\(|Used )([\d.]+)([KMGT]?)(?:\) exceeds available HBM \(| of )([\d.]+)([KMGT]?)(?:\)| hbm)"
)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def compiled_facts(config: TrainConfig, topology: str) -> Facts:
    """Facts of the step compiled for a TPU topology."""
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the compiler's own words, of no class that could be told apart
        raise UserError(f"--topology {topology}: {str(error).splitlines()[0]}") from error
    mesh = make_mesh(config.mesh, list(devices))
    check_batch(config, mesh)
    built = build(config)
    facts = _sizes(built, mesh) | _counts(built, mesh)
    start = time.monotonic()
    facts |= {"compiled": True, "collectives": None, "accessed": None}
    lowered = make_step(built, mesh).lower(built.state, built.frozen, built.batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        facts |= read_overflow(str(error))
    else:
        memory = compiled.memory_analysis()
        new = memory.output_size_in_bytes - memory.alias_size_in_bytes
        facts["used"] = memory.argument_size_in_bytes + new + memory.temp_size_in_bytes
        facts["usable"] = None
        text = compiled.as_text()
        facts["accessed"] = hbm_bytes(text)
        facts["collectives"] = summarize(read_collectives(text))
    facts["bytes"]["temporary"] = facts["used"] - sum(facts["bytes"].values())
    return facts | {"seconds": time.monotonic() - start}


def estimated_facts(config: TrainConfig, chips: int) -> Facts:
    """Facts of the step on so many GPUs, without compiling it."""
    start = time.monotonic()
    mesh, alone = make_mesh(config.mesh), make_mesh(MeshConfig(), jax.devices()[:1])
    check_batch(config, mesh)
    built = build(config)
    rows = config.batch_size // batch_ways(mesh)
    part = dataclasses.replace(
        built,
        config=dataclasses.replace(config, batch_size=rows, mesh=MeshConfig()),
        batch=batch_shapes(built.task, rows),
    )
    facts = _sizes(built, mesh) | _counts(part, alone)
    for name in ("flops", "model_flops"):
        facts[name] *= batch_ways(mesh)
    sizes = facts["bytes"]
    sizes["temporary"] = facts["live_bytes"]
    gradients = {
        "kind": "all-reduce",
        "bytes": 4 * facts["parameters"]["trainable"],
        "arrays": len(jax.tree.leaves(built.state.params)),
        "group": chips,
        "times": 1,
    }
    return facts | {
        "compiled": False,
        "collectives": [gradients] if chips > 1 else [],
        "accessed": None,
        "seconds": time.monotonic() - start,
    }


def read_overflow(message: str) -> Facts:
    """``used`` and ``usable`` from the compiler's complaint that memory does not suffice."""
    match = _OVERFLOW.search(message)
    if match is None:
        raise RuntimeError(f"the step does not compile: {message}")
    used, usable = (
        float(number) * _UNITS[unit] for number, unit in (match.groups()[:2], match.groups()[2:])
    )
    return {"used": used, "usable": usable}


def make_step(built: Abstract, mesh: Mesh) -> TrainStep:
    return make_train_step(built.task, make_optimizer(built.config.optimizer), built.config, mesh)


def _sizes(built: Abstract, mesh: Mesh) -> Facts:
    """Bytes on one device, and what they are bytes of."""
    state = state_shardings(built.state, mesh)
    sizes = {
        "frozen": _share(built.frozen, frozen_shardings(built.frozen, built.config, mesh)),
        "trainable": _share(built.state.params, state.params),
        "optimizer": _share(built.state.opt_state, state.opt_state),
        "ema": _share(built.state.ema, state.ema),
        "batch": _share(built.batch, dict.fromkeys(built.batch, batch_sharding(mesh))),
    }
    return {
        "notes": list(built.notes),
        "parameters": {"frozen": _count(built.frozen), "trainable": _count(built.state.params)},
        "bytes": sizes,
    }


def _counts(built: Abstract, mesh: Mesh) -> Facts:
    """What the trace of the whole step says."""
    jaxpr = _trace(built, mesh)
    return {
        "flops": count_flops(jaxpr),
        "model_flops": model_flops(make_step(built, mesh), built.state, built.frozen, built.batch),
        "live_bytes": peak_bytes(jaxpr),
    }


def _trace(built: Abstract, mesh: Mesh) -> Any:
    return trace(make_step(built, mesh).compute, built.state, built.frozen, built.batch)


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
