"""Train the metric networks (identity and attributes) on people of the ``judge`` split."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

from fact_jax.losses import arcface_loss
from fact_jax.portraits.metric_networks import (
    ATTRIBUTES,
    CROP,
    AttributeNet,
    IdentityNet,
    save_network,
)
from fact_jax.utils.pixels import normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Probability
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.pixels import soften
from fact_train.data.portraits import Photos, align_portraits, draw_portraits, people_of
from fact_train.engine.partition import overlay, split_module
from fact_train.engine.sample_keys import split_keys
from fact_train.engine.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgeOptions(CheckedFields):
    """Who is told apart, from how many photos; ``blur``: how far pictures are softened at most."""

    people: Annotated[int, people_of("judge", at_least=2)] = 1500
    photos: Photos = 12
    blur: Probability = 0.5


class JudgeTask(Task):
    """Train both networks at once; they share nothing but the data."""

    options: JudgeOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.recogniser = split_module(IdentityNet(rngs=nnx.Rngs(config.seed)))
        self.parser = split_module(AttributeNet(rngs=nnx.Rngs(config.seed + 1)))

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        centres = 0.01 * jax.random.normal(key, (128, self.options.people))
        return {
            "recogniser": self.recogniser.arrays,
            "centres": centres,
            "parser": self.parser.arrays,
        }, {}

    def source(self) -> ShuffledArrays:
        batch = draw_portraits("judge", self.options.people, self.options.photos)
        truth = batch.portrait
        masks = np.stack([truth.head_mask, truth.face_mask], axis=-1)
        arrays = {
            "images": batch.images,
            "crops": align_portraits(batch, CROP),
            "person": np.repeat(
                np.arange(self.options.people, dtype=np.int32), self.options.photos
            ),
            "masks": np.rint(masks * 255).astype(np.uint8),
            "points": truth.points,
            "colours": np.concatenate([truth.skin, truth.hair], axis=1),
            **{name: getattr(truth, name).astype(np.int32) for name in ATTRIBUTES},
        }
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        crop_keys, image_keys = split_keys(keys, 2)
        crops = soften(normalize_pixels(batch["crops"]), crop_keys, self.options.blur)
        recogniser = self.recogniser.module(trainable["recogniser"])
        recogniser.train()
        embeddings = recogniser(crops)
        identity, accuracy = arcface_loss(embeddings, trainable["centres"], batch["person"])

        images = soften(normalize_pixels(batch["images"]), image_keys, self.options.blur)
        found = self.parser.module(trainable["parser"])(images)
        masks = batch["masks"] / 255.0
        points = ((found["points"] - batch["points"]) / 16.0) ** 2
        colours = jnp.concatenate([found["skin"], found["hair"]], axis=1) - batch["colours"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        losses = {
            "head": optax.sigmoid_binary_cross_entropy(found["head"], masks[..., 0]).mean(),
            "face": optax.sigmoid_binary_cross_entropy(found["face"], masks[..., 1]).mean(),
            "points": 10.0 * points.mean(),
            "colours": 10.0 * (colours**2).mean(),
            **{name: cross_entropy(found[name], batch[name]).mean() for name in ATTRIBUTES},
        }
        right = {
            f"right/{name}": (found[name].argmax(-1) == batch[name]).mean() for name in ATTRIBUTES
        }
        metrics = {"loss/identity": identity, "accuracy": accuracy, **right}
        metrics |= {f"loss/{name}": value for name, value in losses.items()}
        metrics["pixels/points"] = 16.0 * jnp.sqrt(2 * points.mean())
        metrics["aux"] = nnx.to_pure_dict(nnx.state(recogniser, nnx.BatchStat))
        return identity + sum(losses.values()), metrics

    def state_update(self, trainable, statistics):
        """Put the recogniser's running centre beside the learned weights."""
        return {**trainable, "recogniser": overlay(trainable["recogniser"], statistics)}

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        recogniser = self.recogniser.module(trainable["recogniser"])
        save_network(recogniser, directory / "judge" / "recogniser.safetensors")
        save_network(
            self.parser.module(trainable["parser"]), directory / "judge" / "parser.safetensors"
        )
