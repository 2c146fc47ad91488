"""The miniature's base model: text to 128 x 128 portraits, with CLIP text encoder and UNet.

fact-train run mini_base --out runs/mini_base options.vae=runs/mini_vae/export/vae

As many steps as the shipped one has in all, whose first 8,000 had no attention at 16 x 16:
``miniature/README.md`` tells of it.
"""

from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.base import BaseOptions

config = TrainConfig(
    task="base",
    steps=17000,
    batch_size=16,
    optimizer=OptimizerConfig(
        learning_rate=1e-3, weight_decay=1e-2, warmup_steps=200, schedule="cosine", b2=0.99
    ),
    ema=EMAConfig(decay=0.999),
    checkpoint=CheckpointConfig(every=2000),
    log=LogConfig(every=100, samples_every=2000),
    options=BaseOptions(people=4000, head_weight=2.0),
)
