"""A task small enough to be killed often: two layers that learn a sine, through noise."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fact_train.config import CheckpointConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.engine.partition import paths
from fact_train.tasks import TASKS


def assert_same(left, right):
    """Two trees of the same structure and the same numbers."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyOptions:
    """``poison``: steps in [from, to) have a loss that is not a number."""

    width: int = 16
    poison: tuple[int, int] = (-1, -1)


class ToyTask:
    def __init__(self, config: TrainConfig):
        self.config = config

    def init(self, key):
        first, second = jax.random.split(key)
        trainable = {
            "layers": {
                0: {"kernel": jax.random.normal(first, (1, self.config.options.width))},
                1: {"kernel": jax.random.normal(second, (self.config.options.width, 1)) * 0.1},
            },
            "gate": jnp.ones(()),
            "count": jnp.zeros((1,)),
        }
        return trainable, {"shift": np.full((1,), 0.5, np.float32)}

    def source(self):
        return ToySource(self.config)

    def loss(self, trainable, frozen, batch, *, step, keys):
        x = batch["x"] + 0.01 * jax.vmap(jax.random.normal)(keys)[:, None]
        hidden = jnp.tanh(x @ trainable["layers"][0]["kernel"] + frozen["shift"])
        output = trainable["gate"] * (hidden @ trainable["layers"][1]["kernel"])
        mse = jnp.mean(jnp.square((output - batch["y"]).astype(jnp.float32)))
        low, high = self.config.options.poison
        loss = jnp.where((step >= low) & (step < high), jnp.nan, mse)
        return loss, {"loss/mse": mse, "aux": {"count": jnp.ones((1,))}}

    def state_update(self, trainable, aux):
        return trainable | {"count": trainable["count"] + aux["count"]}

    def samples(self, trainable, frozen, key):
        return {"grid": np.asarray(jax.random.randint(key, (4, 6, 3), 0, 255), np.uint8)}

    def export(self, trainable, frozen, directory: Path, step: int):
        arrays = {path: np.asarray(leaf) for path, leaf in paths(trainable)}
        save_file(arrays, directory / "toy.safetensors")


class ToySource:
    def __init__(self, config: TrainConfig):
        self.config = config

    def batches(self, start, rows):
        for step in itertools.count(start):
            chance = np.random.default_rng((self.config.seed, step))
            x = chance.uniform(-2, 2, (self.config.batch_size, 1))[rows]
            yield {"x": x.astype(np.float32), "y": np.sin(x).astype(np.float32)}


TASKS["toy"] = (__name__, "ToyTask")

config = TrainConfig(
    task="toy",
    steps=60,
    batch_size=8,
    seed=3,
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
    checkpoint=CheckpointConfig(every=7, keep=3),
    log=LogConfig(every=10),
    options=ToyOptions(),
)
