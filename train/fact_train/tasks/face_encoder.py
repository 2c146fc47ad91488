"""Train a TransFace of the miniature's size with ArcFace on made-up people."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import PyTree

from fact_convert import save_encoder
from fact_jax.losses import arcface_loss
from fact_jax.models.transface import TransFace, TransFaceConfig
from fact_jax.utils.pixels import normalize_pixels
from fact_jax.utils.ranges import CheckedFields, Probability
from fact_train.config import TrainConfig
from fact_train.data.array_source import ShuffledArrays
from fact_train.data.pixels import soften
from fact_train.data.portraits import Photos, draw_crops, people_of
from fact_train.engine.partition import overlay, split_module
from fact_train.engine.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderOptions(CheckedFields):
    """How many people of a split are classified, from how many photos of each, and how blurred."""

    split: Literal["encoder", "base"] = "encoder"
    people: Annotated[int, people_of("encoder", at_least=2)] = 2000
    photos: Photos = 10
    blur: Probability = 0.0


class EncoderTask(Task):
    """Tell people apart by their aligned crops (additive angular margin)."""

    options: EncoderOptions

    def __init__(self, config: TrainConfig):
        super().__init__(config)
        self.encoder = split_module(TransFace(TransFaceConfig.mini(), rngs=nnx.Rngs(config.seed)))

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        size = TransFaceConfig.mini().num_classes
        centres = 0.01 * jax.random.normal(key, (size, self.options.people))
        return {"encoder": self.encoder.arrays, "centres": centres}, {}

    def source(self) -> ShuffledArrays:
        options, size = self.options, TransFaceConfig.mini().img_size
        crops = draw_crops(options.split, options.people, options.photos, size)
        labels = np.repeat(np.arange(options.people, dtype=np.int32), options.photos)
        arrays = {"crops": crops, "labels": labels}
        return ShuffledArrays(arrays, self.config.batch_size, self.config.seed)

    def loss(self, trainable, frozen, batch, *, step, keys):
        encoder = self.encoder.module(trainable["encoder"])
        encoder.train()
        crops = normalize_pixels(batch["crops"])
        if self.options.blur:
            crops = soften(crops, keys, self.options.blur)
        _, embeddings = encoder(crops)
        loss, accuracy = arcface_loss(embeddings, trainable["centres"], batch["labels"])
        statistics = nnx.to_pure_dict(nnx.state(encoder, nnx.BatchStat))
        return loss, {"accuracy": accuracy, "aux": statistics}

    def state_update(self, trainable, statistics):
        """Put the batch normalisations' running statistics beside the learned weights."""
        return {**trainable, "encoder": overlay(trainable["encoder"], statistics)}

    def export(self, trainable: PyTree, frozen: PyTree, directory: Path, step: int) -> None:
        save_encoder(self.encoder.module(trainable["encoder"]), directory / "encoder")
