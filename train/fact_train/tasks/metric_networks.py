"""Train the metric networks on people of the ``judge`` split."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Float, PyTree

from fact_jax.losses import arcface_loss
from fact_jax.portraits import SPLITS, Batch, sample_identity
from fact_jax.portraits.metric_networks import (
    ATTRIBUTES,
    CROP,
    AttributeNet,
    FaceFeatureNet,
    IdentityNet,
    face_features,
    save_network,
)
from fact_jax.utils.pixels import normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Length, Probability
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.pixels import soften
from fact_train.data.portraits import (
    Photos,
    align_portraits,
    people_of,
    portrait_arrays,
)
from fact_train.engine.partition import overlay, split_module
from fact_train.engine.sample_keys import split_keys
from fact_train.engine.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricNetworksOptions(CheckedFields):
    """Who is told apart, from how many photos; ``blur``: how far pictures are softened at most.

    ``networks`` are those that are trained: each has a file of its name.
    """

    people: Annotated[int, people_of("judge", at_least=2)] = 1500
    photos: Photos = 12
    blur: Probability = 0.5
    networks: Annotated[tuple[Literal["recogniser", "parser", "features"], ...], Length(1)] = (
        "recogniser",
        "parser",
        "features",
    )


class MetricNetworksTask(Task):
    """Train the networks at once; they share nothing but the data."""

    options: MetricNetworksOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        kinds = {"recogniser": IdentityNet, "parser": AttributeNet, "features": FaceFeatureNet}
        modules: dict[str, Any] = {}
        for number, (name, kind) in enumerate(kinds.items()):
            if name in self.options.networks:
                modules[name] = kind(rngs=nnx.Rngs(config.seed + number))
        if "features" in modules:
            truth = self._true_features()
            self.deviation = truth.std(0)
            modules["features"].mean[...] = truth.mean(0)
            modules["features"].deviation[...] = self.deviation
        self.networks = {name: split_module(module) for name, module in modules.items()}

    def _true_features(self) -> Float[np.ndarray, "n 11"]:
        people = np.asarray(SPLITS["judge"][: self.options.people])
        return face_features(sample_identity(people))

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        trainable: dict[str, Any] = {
            name: network.arrays for name, network in self.networks.items()
        }
        if "recogniser" in trainable:
            centres = 0.01 * jax.random.normal(key, (128, self.options.people))
            trainable["centres"] = centres
        return trainable, {}

    def source(self) -> ShuffledArrays:
        def described(batch: Batch) -> dict[str, np.ndarray]:
            truth = batch.portrait
            masks = np.stack([truth.head_mask, truth.face_mask], axis=-1)
            return {
                "images": batch.images,
                "crops": align_portraits(batch, CROP),
                "person": batch.ids - np.int32(SPLITS["judge"][0]),
                "masks": np.rint(masks * 255).astype(np.uint8),
                "points": truth.points,
                "colours": np.concatenate([truth.skin, truth.hair], axis=1),
                "features": face_features(sample_identity(batch.ids)),
                **{name: getattr(truth, name).astype(np.int32) for name in ATTRIBUTES},
            }

        people, photos = self.options.people, self.options.photos
        arrays = portrait_arrays("judge", people, photos, described, size=64)
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        crop_keys, image_keys = split_keys(keys, 2)
        crops = soften(normalize_pixels(batch["crops"]), crop_keys, self.options.blur)
        losses: dict[str, jax.Array] = {}
        metrics: dict[str, Any] = {"aux": {}}
        networks: dict[str, Any] = {
            name: one.module(trainable[name]) for name, one in self.networks.items()
        }
        if "recogniser" in networks:
            networks["recogniser"].train()
            embeddings = networks["recogniser"](crops)
            losses["identity"], metrics["accuracy"] = arcface_loss(
                embeddings, trainable["centres"], batch["person"]
            )
            metrics["aux"] = nnx.to_pure_dict(nnx.state(networks["recogniser"], nnx.BatchStat))
        if "features" in networks:
            error = (networks["features"](crops) - batch["features"]) / self.deviation
            losses["features"] = (error**2).mean()
        if "parser" in networks:
            images = soften(normalize_pixels(batch["images"]), image_keys, self.options.blur)
            found = networks["parser"](images)
            masks = batch["masks"] / 255.0
            points = ((found["points"] - batch["points"]) / 16.0) ** 2
            colours = jnp.concatenate([found["skin"], found["hair"]], axis=1) - batch["colours"]
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            losses |= {
                "head": optax.sigmoid_binary_cross_entropy(found["head"], masks[..., 0]).mean(),
                "face": optax.sigmoid_binary_cross_entropy(found["face"], masks[..., 1]).mean(),
                "points": 10.0 * points.mean(),
                "colours": 10.0 * (colours**2).mean(),
                **{name: cross_entropy(found[name], batch[name]).mean() for name in ATTRIBUTES},
            }
            for name in ATTRIBUTES:
                metrics[f"right/{name}"] = (found[name].argmax(-1) == batch[name]).mean()
            metrics["pixels/points"] = 16.0 * jnp.sqrt(2 * points.mean())
        metrics |= {f"loss/{name}": value for name, value in losses.items()}
        return sum(losses.values()), metrics

    def state_update(self, trainable, statistics):
        """Put the recogniser's running centre beside the learned weights."""
        if "recogniser" not in trainable:
            return trainable
        return {**trainable, "recogniser": overlay(trainable["recogniser"], statistics)}

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        for name, network in self.networks.items():
            file = directory / "judge" / f"{name}.safetensors"
            save_network(network.module(trainable[name]), file)
