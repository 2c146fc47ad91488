"""The shipped adapter's last training: goes on from one of ``mini``'s.

fact-train run mini_points --out runs/mini_points

The resampler first learns, alone, to tell the encoder's embedding. What lies near eyes, nose and
mouth weighs more, FAIR less than in ``mini``.
"""

from dataclasses import replace

from fact_jax.curriculum import Stage
from fact_train.configs.mini import config as mini

STEPS = 15000

config = replace(
    mini,
    steps=STEPS,
    options=replace(
        mini.options,
        weights="runs/mini/export/adapter.safetensors",
        pretrain_resampler=5000,
        people=4000,
        point_weight=20.0,
        stages=(Stage(steps=STEPS, shuffle=(0.9, 0.9), fair_weight=(0.002, 0.002)),),
    ),
)
