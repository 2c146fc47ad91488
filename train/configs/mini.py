"""FACT on the miniature: adapters and resampler, on the shipped base and encoder.

fact-train run mini --out runs/mini
"""

from fact_jax.curriculum import Stage
from train.config import CheckpointConfig, EMAConfig, LogConfig, OptimizerConfig, TrainConfig
from train.tasks.adapter import AdapterOptions

config = TrainConfig(
    task="adapter",
    steps=2200,
    batch_size=16,
    optimizer=OptimizerConfig(
        learning_rate=2e-3, weight_decay=1e-2, warmup_steps=100, schedule="cosine", b2=0.99
    ),
    ema=EMAConfig(decay=0.99),
    checkpoint=CheckpointConfig(every=500),
    log=LogConfig(every=25, samples_every=400),
    options=AdapterOptions(
        stages=(
            Stage(steps=300, shuffle=(0.0, 0.0)),
            Stage(steps=500, shuffle=(0.0, 0.9), fair_weight=(0.0, 0.01), ramp="cosine"),
            Stage(steps=1400, shuffle=(0.9, 0.9), fair_weight=(0.01, 0.01)),
        ),
        face_weight=2.0,
    ),
)
