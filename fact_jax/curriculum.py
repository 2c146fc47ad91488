"""Condition dropout, shuffle, FAIR weight and captions as pure functions of the step.

FACT keeps its adapter from copying: with growing probability the condition comes from another
photo of the same person (shuffle), and with some probability there is none (dropout).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fact_jax.utils.ranges import CheckedFields, CountOrZero, NonNegative, Probability

StageText = Literal["caption", "empty_caption", "no_cross_attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(CheckedFields):
    """``steps`` steps over which both values go from their first number to their second.

    ``text`` says what a stage reads: each sample's ``caption``; for all of them the
    ``empty_caption``, to which text cross-attention still attends; or nothing, with
    ``no_cross_attention``: there text cross-attention adds nothing to the features (as in
    Infinite-ID's training, arXiv 2403.11781), and the adapter has to learn the face from the face.
    True and False, of older experiments, are the first and the second.
    """

    steps: CountOrZero
    shuffle: tuple[Probability, Probability] = (0.0, 0.0)
    fair_weight: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    text: StageText | bool = "caption"
    ramp: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text, bool):
            object.__setattr__(self, "text", "caption" if self.text else "empty_caption")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drop(CheckedFields):
    """Probabilities of leaving out the face alone, the text alone, and both."""

    face: Probability = 0.05
    text: Probability = 0.05
    both: Probability = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if (total := self.face + self.text + self.both) > 1 + 1e-9:
            raise ValueError(f"face + text + both must be at most 1, not {total:g}")


class StageValues(NamedTuple):
    """Shuffle probability, FAIR weight, whether captions are read (1) or not (0), and whether text
    cross-attention is on (1) or adds nothing (0)."""

    shuffle: Float[Array, ""]
    fair_weight: Float[Array, ""]
    text: Float[Array, ""]
    cross_attention: Float[Array, ""]


def stage_values(stages: tuple[Stage, ...], step: Int[Array, ""] | int) -> StageValues:
    """The curriculum at ``step``; after the last stage its end values hold."""
    shuffle, weight = (jnp.asarray(pair[0], jnp.float32) for pair in _ends(stages[0]))
    text, attended = (jnp.asarray(flag, jnp.float32) for flag in _reads(stages[0]))
    first = 0
    for stage in stages:
        progress = jnp.clip((step - first) / max(stage.steps, 1), 0.0, 1.0)
        if stage.ramp == "cosine":
            progress = 0.5 - 0.5 * jnp.cos(jnp.pi * progress)
        begun = jnp.asarray(step) >= first
        shuffle, weight = (
            jnp.where(begun, low + (high - low) * progress, value)
            for value, (low, high) in zip((shuffle, weight), _ends(stage), strict=True)
        )
        text, attended = (
            jnp.where(begun, flag, value)
            for value, flag in zip((text, attended), _reads(stage), strict=True)
        )
        first += stage.steps
    return StageValues(shuffle, weight, text, attended)


def _ends(stage: Stage) -> tuple[tuple[float, float], tuple[float, float]]:
    return stage.shuffle, stage.fair_weight


def _reads(stage: Stage) -> tuple[float, float]:
    return float(stage.text == "caption"), float(stage.text != "no_cross_attention")


def draw_shuffle(keys: Key[Array, " b"], probability: Float[Array, ""]) -> Bool[Array, " b"]:
    """Which samples take their condition from another photo of the same person."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)


def draw_drop(keys: Key[Array, " b"], drop: Drop) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
    """Which samples drop the face and which the text; one draw decides between the three cases."""
    draw = jax.vmap(jax.random.uniform)(keys)
    face_only = draw < drop.face
    text_only = (draw >= drop.face) & (draw < drop.face + drop.text)
    both = (draw >= drop.face + drop.text) & (draw < drop.face + drop.text + drop.both)
    return face_only | both, text_only | both
