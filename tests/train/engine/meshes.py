"""Train a few steps on fake devices in one mesh after another; prints what came out as JSON.

python -m tests.train.engine.meshes MINIATURE [VARIANT ...]
"""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fact_jax.ops.attention import attention_query_chunked
from fact_jax.sharding import MeshConfig, batch_sharding, global_batch, make_mesh, replicated, shard
from fact_train.config import TrainConfig
from fact_train.engine.checksums import checksums
from fact_train.engine.state import make_optimizer, path_name, place_state
from fact_train.engine.step import TrainStep, frozen_shardings
from fact_train.overrides import override
from fact_train.tasks import make_task
from fact_train.tasks.validation import ValidationCallback, draw_validation
from tests.fact_jax.tiny import FACE_DIM, TEXT_DIM, normal, tiny_unet
from tests.train.random_rows import BATCH, config

STEPS = 3
VARIANTS = {
    "one": {},
    "8x1x1": {},
    "1x8x1": {"mesh": MeshConfig(fsdp=8)},
    "2x2x2": {"mesh": MeshConfig(fsdp=2, tensor=2)},
    "base split": {"mesh": MeshConfig(fsdp=8, base="fsdp")},
    "base split 2x2x2": {"mesh": MeshConfig(fsdp=2, tensor=2, base="fsdp")},
    "2x2x2 accumulate": {"mesh": MeshConfig(fsdp=2, tensor=2), "accumulate": 2},
    "accumulate": {"accumulate": 2},
    "remat": {"remat": "block"},
}


class Trainer:
    """The task and its data, made once."""

    def __init__(self, config: TrainConfig):
        self.config, self.task = config, make_task(config)
        self.params, self.frozen = self.task.init(jax.random.key(0))
        self.rows = np.arange(BATCH)
        batches = self.task.source().batches(0, self.rows)
        self.batches = list(itertools.islice(batches, STEPS))

    def run(self, name: str) -> dict:
        """Losses, final state, where it lies, and the text of the compiled step."""
        config = dataclasses.replace(self.config, **VARIANTS[name])
        mesh = make_mesh(config.mesh, jax.devices()[: 1 if name == "one" else 8])
        self.task.config = config
        optimizer = make_optimizer(config.optimizer)
        state = place_state(self.params, optimizer, config.ema, mesh)
        frozen = shard(self.frozen, frozen_shardings(self.frozen, config, mesh))
        batches = [global_batch(mesh, BATCH, self.rows, batch) for batch in self.batches]
        step = TrainStep(self.task, optimizer, config, mesh)
        compiled = step.lower(state, frozen, batches[0]).compile()
        held = {
            path_name(path): leaf.addressable_data(0).nbytes / leaf.nbytes
            for path, leaf in jax.tree_util.tree_leaves_with_path((state, frozen))
            if leaf.ndim
        }
        losses = []
        for batch in batches:
            state, metrics = compiled(state, frozen, batch, step.key)
            losses.append({name: float(value) for name, value in metrics.items()})
        arrays = {
            path_name(path): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.ema))
        }
        return {"metrics": losses, "arrays": arrays, "held": held, "text": compiled.as_text()}


def attention_text() -> str:
    """The compiled gradient of the accelerators' attention, the batch over all devices."""
    placed = batch_sharding(make_mesh(MeshConfig()))
    heads = jax.ShapeDtypeStruct((8, 64, 2, 8), np.float32)

    def total(q, k, v):
        return attention_query_chunked(q, k, v, tile=16).sum()

    gradient = jax.grad(total, argnums=(0, 1, 2))
    jitted = jax.jit(gradient, in_shardings=(placed,) * 3, out_shardings=(placed,) * 3)
    return jitted.lower(heads, heads, heads).compile().as_text()


def without_text_attention() -> dict[str, float]:
    """A compiled UNet over all devices, its text cross-attention off: what two texts change."""
    mesh = make_mesh(MeshConfig())
    rows, whole = batch_sharding(mesh), replicated(mesh)
    graph, state = nnx.split(tiny_unet())
    latents, face = normal(1, 8, 4, 4, 4), normal(3, 8, 5, FACE_DIM)
    texts = normal(2, 8, 7, TEXT_DIM), normal(4, 8, 7, TEXT_DIM)

    def run(state, latents, text, face, on):
        unet = nnx.merge(graph, state)
        return unet(latents, jnp.asarray(500), text, face, text_attention=on)

    jitted = jax.jit(run, in_shardings=(whole, rows, rows, rows, whole), out_shardings=rows)
    on, off = (
        [np.asarray(jitted(state, latents, text, face, jnp.asarray(flag))) for text in texts]
        for flag in (True, False)
    )
    return {name: float(np.abs(a - b).max()) for name, (a, b) in {"on": on, "off": off}.items()}


def checksums_when_split() -> list[dict[str, int]]:
    """Of the array that :mod:`tests.train.engine.test_mesh` sums too, split in several ways."""
    array = np.random.default_rng(0).standard_normal((8, 6, 4)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = (P(), P("a"), P("b", None, "a"), P(("a", "b")))
    return [checksums([jax.device_put(array, NamedSharding(mesh, spec))]) for spec in specs]


def watched(trainer: Trainer) -> dict[str, float]:
    """Pictures of three people on eight devices against one: the largest difference, in levels of
    255 and in the numbers. All but three devices draw rows that nobody looks at."""
    task = trainer.task
    drawn = draw_validation(task.size, task.encoder.config.img_size)
    people = dataclasses.asdict(drawn).items()
    few = dataclasses.replace(drawn, **{name: rows[:3] for name, rows in people})
    loud = jax.tree.map(lambda leaf: leaf + 0.3, trainer.params)
    made = []
    for devices in (jax.devices(), jax.devices()[:1]):
        mesh = make_mesh(MeshConfig(), devices)
        weights = (loud, trainer.frozen)
        weights = shard(weights, jax.tree.map(lambda _, mesh=mesh: replicated(mesh), weights))
        made.append(ValidationCallback(task, few, mesh)(*weights, jax.random.key(1)))
    difference = {
        name: float(np.abs(np.asarray(one, np.float64) - made[0][name]).max())
        for name, one in made[1].items()
    }
    return {"difference": difference, "change": made[0]["validation/inside_change"]}


def main(folder: Path, names: list[str]) -> None:
    print(json.dumps({"name": "checksums", "split": checksums_when_split()}), flush=True)
    print(json.dumps({"name": "attention", "text": attention_text()}), flush=True)
    print(json.dumps({"name": "text attention", **without_text_attention()}), flush=True)
    paths = [f"options.base={folder / 'base'}", f"options.encoder={folder / 'encoder'}"]
    trainer = Trainer(override(config, paths))
    if "watched" in names:
        print(json.dumps({"name": "watched", **watched(trainer)}), flush=True)
    reference = None
    for name in (name for name in names if name in VARIANTS):
        found = trainer.run(name)
        arrays = found.pop("arrays")
        reference = reference or arrays
        found["difference"] = {
            path: float(np.abs(array - reference[path]).max() / np.abs(reference[path]).max())
            for path, array in arrays.items()
            if np.abs(reference[path]).max() > 0
        }
        found["bytes"] = {p: a.nbytes for p, a in arrays.items() if p.startswith("0/")}
        print(json.dumps({"name": name, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(VARIANTS))
