"""FACT on the miniature, a few minutes more: goes on from the shipped adapter on fewer people.

fact-train run mini_demo --out demo/train
"""

from dataclasses import replace

from fact_train.config import CheckpointConfig, LogConfig
from fact_train.configs.mini_points import config as mini_points

STEPS = 300

config = replace(
    mini_points,
    steps=STEPS,
    optimizer=replace(mini_points.optimizer, learning_rate=2e-4, warmup_steps=20),
    checkpoint=CheckpointConfig(every=50),
    log=LogConfig(every=10, samples_every=100),
    options=replace(
        mini_points.options,
        people=300,
        pretrain_resampler=0,
        weights="miniature/adapter/adapter.safetensors",
        # The stage in which the shipped run ended.
        stages=(replace(mini_points.options.stages[-1], steps=STEPS),),
    ),
)
