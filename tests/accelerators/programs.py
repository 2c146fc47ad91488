"""Programs compiled for devices that are not here, in a process of their own.

`python -m tests.accelerators.programs TARGET FOLDER NAME...` writes the compiled text of each
program (of a function of this module) to FOLDER/NAME.
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fact_jax.mesh import MeshConfig
from fact_jax.ops import attention as module
from fact_jax.ops.attention import attention
from fact_jax.ops.attention_kernels import HiddenKeys
from fact_jax.plan.targets import Target
from fact_jax.sharding import BATCH_AXES, make_mesh
from fact_train.config import load_config
from fact_train.engine.state import make_optimizer
from fact_train.engine.step import TrainStep
from fact_train.overrides import override
from fact_train.plan.abstract_task import build

LEVELS = {"large": (4096, 40), "middle": (1024, 80), "small": (576, 160)}
"""Tokens and head width of the UNet's levels; the last at 768 x 768."""


def attention_program(mesh, name):
    """``attention-LEVEL-KEYS-DTYPE``: forwards and backwards; ``masked`` keys are 16 of two people,
    hidden by regions."""
    _, level, keys, dtype = name.split("-")
    n, width = LEVELS[level]
    people = 2 if keys == "masked" else 0
    m = 77 if keys == "text" else n + 16 * max(people, 1)
    batch = 2 * mesh.size
    place = NamedSharding(mesh, P(BATCH_AXES))

    def shape(rows):
        return jax.ShapeDtypeStruct((batch, rows, 8, width), jnp.dtype(dtype), sharding=place)

    def gradients(q, k, v):
        hidden = None
        if people:
            queries = jnp.arange(n)[None, :, None] % 2 == jnp.arange(people)
            keys = (jnp.arange(m)[None, :, None] - n) // 16 == jnp.arange(people)
            hidden = HiddenKeys(queries, keys)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.vjp(lambda *a: attention(*a, hidden), q, k, v)[1](q)

    return jax.jit(gradients).lower(shape(n), shape(m), shape(m))


def step_program(mesh, name):
    """``step-PRECISION``: the miniature's, in two microbatches, every attention by its kernel."""
    precision = name.split("-")[1]
    config = override(
        load_config("mini")[1],
        [f"precision={precision}", "accumulate=2", f"batch_size={4 * mesh.size}", "remat=block"],
    )
    built = build(config)
    step = TrainStep(built.task, make_optimizer(config.optimizer), config, mesh)
    module.KEPT_MATRIX_LIMIT = 0
    return step.lower(built.state, built.frozen, built.batch)


def main(target: str, folder: str, *names: str) -> None:
    wanted = Target(**json.loads(target))
    topology = topologies.get_topology_desc(platform=wanted.platform, **wanted.options)
    mesh = make_mesh(MeshConfig(), list(topology.devices))
    for name in names:
        program = step_program if name.startswith("step") else attention_program
        Path(folder, name).write_text(program(mesh, name).compile().as_text())


def as_argument(target: Target) -> str:
    return json.dumps(dataclasses.asdict(target))


if __name__ == "__main__":
    main(*sys.argv[1:])
