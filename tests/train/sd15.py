"""One training step at Stable Diffusion 1.5's size.

fact-train run tests/train/sd15.py --out DIR options.base=FOLDER options.encoder=FOLDER
"""

from fact_jax.curriculum import Stage
from fact_jax.models.resampler import ResamplerConfig
from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, TrainConfig
from fact_train.tasks.adapter import AdapterOptions

config = TrainConfig(
    task="adapter",
    steps=1,
    batch_size=1,
    ema=EMAConfig(decay=0.0),
    checkpoint=CheckpointConfig(keep=1),
    log=LogConfig(every=1, samples_every=None),  # pictures would take an hour
    options=AdapterOptions(
        resampler=ResamplerConfig.sd15(),
        people=1,
        photos=2,
        stages=(Stage(steps=1, fair_weight=(0.01, 0.01)),),
    ),
)
