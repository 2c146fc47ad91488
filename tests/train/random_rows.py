"""The real adapter task on random latents and face tokens: no portrait is drawn, none is shown.

fact-train run tests/train/random_rows.py options.base=FOLDER/base options.encoder=FOLDER/encoder
"""

import dataclasses
from pathlib import Path

import numpy as np

from fact_convert import tokenize
from fact_train.config import CheckpointConfig, LogConfig, OptimizerConfig
from fact_train.data.array_source import PairedArrays
from fact_train.tasks import TASKS
from fact_train.tasks.adapter import AdapterTask
from tests.train.tiny import tiny_config

PEOPLE, PHOTOS, BATCH = 12, 3, 16


class RandomRowsTask(AdapterTask):
    def some_tokens(self):
        return self._arrays()["tokens"].astype(np.float32)

    def _arrays(self):
        chance, count = np.random.default_rng(0), PEOPLE * PHOTOS
        unet, encoder = self.pipeline.unet.config, self.encoder.config
        captions = ["a portrait of a person", "a man with a beard"] * (count // 2)
        cells = (count, unet.sample_size, unet.sample_size)
        return {
            "latents": chance.standard_normal((*cells, unet.in_channels), np.float32),
            "ids": tokenize(self.pipeline.tokenizer, captions)[0],
            "mask": chance.integers(0, 2, cells).astype(np.float32),
            "tokens": chance.standard_normal(
                (count, encoder.tokens, encoder.embed_dim), np.float32
            ).astype(np.float16),
        }

    def source(self):
        return PairedArrays(self._arrays(), self.config.batch_size, self.config.seed, PHOTOS)

    def samples(self, trainable, frozen, key):
        return {}


TASKS["random_rows"] = (__name__, "RandomRowsTask")

config = dataclasses.replace(
    tiny_config(Path("miniature")),
    task="random_rows",
    steps=6,
    batch_size=BATCH,
    # Adam divides each gradient by its own size, and the small ones are mostly rounding. With this
    # epsilon an update is as exact as its gradient.
    optimizer=OptimizerConfig(learning_rate=1.0, eps=1.0),
    checkpoint=CheckpointConfig(every=100),
    log=LogConfig(every=1),
)
