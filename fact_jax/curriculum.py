"""Drop, shuffle, FAIR weight and captions as pure functions of the step.

FACT trains its adapter so that nothing but identity is worth copying: the condition comes, with a
growing probability, from another photo of the same person, and sometimes there is none at all.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from fact_jax.ranges import CountOrZero, NonNegative, Probability, check_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """``steps`` steps over which both values go from their first number to their second.

    With ``text`` false every caption of the stage is the empty one: the adapter then has to learn
    the face from the face.
    """

    steps: CountOrZero
    shuffle: tuple[Probability, Probability] = (0.0, 0.0)
    fair_weight: tuple[NonNegative, NonNegative] = (0.0, 0.0)
    text: bool = True
    ramp: Literal["linear", "cosine"] = "linear"

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drop:
    """Probabilities of leaving out the face alone, the text alone, and both."""

    face: Probability = 0.05
    text: Probability = 0.05
    both: Probability = 0.05

    def __post_init__(self):
        check_fields(self)
        if (total := self.face + self.text + self.both) > 1 + 1e-9:
            raise ValueError(f"face + text + both must be at most 1, not {total:g}")


class StageValues(NamedTuple):
    """Shuffle probability, FAIR weight, and whether captions are read (1) or empty (0)."""

    shuffle: Float[Array, ""]
    fair_weight: Float[Array, ""]
    text: Float[Array, ""]


def stage_values(stages: tuple[Stage, ...], step: Int[Array, ""] | int) -> StageValues:
    """The curriculum at ``step``; after the last stage its end values hold."""
    shuffle, weight = (jnp.asarray(pair[0], jnp.float32) for pair in _ends(stages[0]))
    text = jnp.asarray(stages[0].text, jnp.float32)
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
        text = jnp.where(begun, float(stage.text), text)
        first += stage.steps
    return StageValues(shuffle, weight, text)


def _ends(stage: Stage) -> tuple[tuple[float, float], tuple[float, float]]:
    return stage.shuffle, stage.fair_weight


def draw_shuffle(keys: Key[Array, " b"], probability: Float[Array, ""]) -> Bool[Array, " b"]:
    """Which samples take their condition from another photo of the same person."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)


def draw_drop(keys: Key[Array, " b"], drop: Drop) -> tuple[Bool[Array, " b"], Bool[Array, " b"]]:
    """Which samples lose the face and which the text; one draw, so the three cases exclude."""
    draw = jax.vmap(jax.random.uniform)(keys)
    face_only = draw < drop.face
    text_only = (draw >= drop.face) & (draw < drop.face + drop.text)
    both = (draw >= drop.face + drop.text) & (draw < drop.face + drop.text + drop.both)
    return face_only | both, text_only | both


def draw_neutral(keys: Key[Array, " b"], probability: float) -> Bool[Array, " b"]:
    """Which samples get the neutral caption: what it leaves unsaid must come from the face."""
    return jax.vmap(lambda key: jax.random.bernoulli(key, probability))(keys)
