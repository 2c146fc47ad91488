"""FACT itself: what every other configuration is compared with.

The recipe of ``mini``, shortened: sequential adapters, FAIR 0.01, shuffle with a curriculum, drops.
No claim of its own.
"""

from dataclasses import replace

from fact_jax.curriculum import Stage
from fact_train.config import CheckpointConfig, LogConfig, TrainConfig
from fact_train.configs.mini import config as mini
from fact_train.lab.question import Question

STEPS, PEOPLE = 1500, 2000
ALONE, RAMP, REST = 120, 280, STEPS - 120 - 280
"""Steps without shuffle and FAIR, steps in which both grow, and steps at their full values."""


def stages(shuffle: float = 0.9, fair: float = 0.01) -> tuple[Stage, ...]:
    """The curriculum: nothing, growing, full."""
    return (
        Stage(steps=ALONE),
        Stage(steps=RAMP, shuffle=(0.0, shuffle), fair_weight=(0.0, fair), ramp="cosine"),
        Stage(steps=REST, shuffle=(shuffle, shuffle), fair_weight=(fair, fair)),
    )


def variant(**options: object) -> TrainConfig:
    """FACT with other options of the adapter task."""
    return replace(
        mini,
        steps=STEPS,
        checkpoint=CheckpointConfig(every=500, keep=1),
        log=LogConfig(every=50, samples_every=None),
        options=replace(mini.options, **{"stages": stages(), "people": PEOPLE, **options}),
    )


question = Question(variants={"fact": variant()})
