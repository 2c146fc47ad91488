"""FACT on the miniature: adapters and resampler, on the shipped base and encoder.

fact-train run mini --out runs/mini
"""

from fact_jax.curriculum import Stage
from fact_train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from fact_train.tasks.adapter import AdapterOptions

config = TrainConfig(
    task="adapter",
    steps=8500,
    batch_size=16,
    optimizer=OptimizerConfig(
        learning_rate=1e-3, weight_decay=1e-2, warmup_steps=100, schedule="cosine", b2=0.99
    ),
    ema=EMAConfig(decay=0.999),
    checkpoint=CheckpointConfig(every=1000),
    log=LogConfig(every=100, samples_every=1000),
    options=AdapterOptions(
        stages=(
            Stage(steps=500, shuffle=(0.0, 0.0)),
            Stage(steps=1000, shuffle=(0.0, 0.9), fair_weight=(0.0, 0.01), ramp="cosine"),
            Stage(steps=7000, shuffle=(0.9, 0.9), fair_weight=(0.01, 0.01)),
        ),
        people=3000,
        face_weight=4.0,
    ),
)
