"""Stage values by hand, draws by their frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.curriculum import (
    Drop,
    Stage,
    draw_drop,
    draw_shuffle,
    stage_values,
)

STAGES = (
    Stage(steps=100),
    Stage(steps=200, shuffle=(0.0, 0.8), fair_weight=(0.002, 0.01), ramp="linear"),
    Stage(steps=40, shuffle=(0.8, 0.4), fair_weight=(0.05, 0.03), ramp="cosine"),
    Stage(steps=10, shuffle=(0.9, 0.9), fair_weight=(0.02, 0.02)),
)
COUNT = 20_000


def keys(seed, count=COUNT):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("step", "shuffle", "weight"),
    [
        (0, 0.0, 0.0),
        (99, 0.0, 0.0),
        (100, 0.0, 0.002),
        (150, 0.2, 0.004),
        (299, 0.796, 0.00996),
        (300, 0.8, 0.05),
        (310, 0.8 - 0.4 * (0.5 - 0.5**1.5), 0.05 - 0.02 * (0.5 - 0.5**1.5)),
        (320, 0.6, 0.04),
        (340, 0.9, 0.02),
        (349, 0.9, 0.02),
        (1_000_000, 0.9, 0.02),
    ],
)
def test_stages_by_hand(step, shuffle, weight):
    for form in (step, jnp.asarray(step)):
        np.testing.assert_allclose(stage_values(STAGES, form)[:2], (shuffle, weight), atol=1e-6)


def test_the_end_of_a_ramp_holds():
    stages = (Stage(steps=10, shuffle=(0.1, 0.7), fair_weight=(0.3, 0.0), ramp="cosine"),)
    for step in (10, 11, 5000):
        np.testing.assert_allclose(stage_values(stages, step), (0.7, 0.0, 1.0, 1.0), atol=1e-6)


def test_a_stage_of_no_steps_is_never_seen():
    stages = (Stage(steps=0, shuffle=(0.5, 0.5)), Stage(steps=5, shuffle=(0.1, 0.1)))
    assert stage_values(stages, 0)[0] == pytest.approx(0.1)


def test_stages_without_text():
    stages = (
        Stage(steps=3, text="empty_caption"),
        Stage(steps=4),
        Stage(steps=2, text="no_cross_attention"),
    )
    values = [stage_values(stages, step) for step in range(11)]
    assert [float(value.text) for value in values] == [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]
    attended = [float(value.cross_attention) for value in values]
    assert attended == [1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_true_and_false_of_older_experiments():
    assert Stage(steps=1, text=True) == Stage(steps=1, text="caption") == Stage(steps=1)
    assert Stage(steps=1, text=False) == Stage(steps=1, text="empty_caption")


def test_stages_within_a_compiled_step():
    run = jax.jit(lambda step: stage_values(STAGES, step))
    np.testing.assert_allclose(run(jnp.asarray(150, jnp.int32)), (0.2, 0.004, 1, 1), atol=1e-6)


def assert_frequency(drawn, probability: float) -> None:
    """Within four standard errors."""
    error = (probability * (1 - probability) / COUNT) ** 0.5
    assert abs(np.mean(drawn) - probability) <= 4 * error


def test_drops_exclude_each_other_and_have_their_frequencies():
    drop = Drop(face=0.05, text=0.1, both=0.2)
    face, text = (np.asarray(x) for x in draw_drop(keys(1), drop))
    assert_frequency(face & ~text, 0.05)
    assert_frequency(text & ~face, 0.1)
    assert_frequency(face & text, 0.2)
    assert_frequency(~face & ~text, 0.65)


def test_certain_drops():
    for drop, expected in (
        (Drop(face=1.0, text=0.0, both=0.0), (1, 0)),
        (Drop(face=0.0, text=1.0, both=0.0), (0, 1)),
        (Drop(face=0.0, text=0.0, both=1.0), (1, 1)),
        (Drop(face=0.0, text=0.0, both=0.0), (0, 0)),
    ):
        drawn = draw_drop(keys(2, 50), drop)
        assert tuple(float(jnp.mean(x)) for x in drawn) == expected


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_shuffle_has_its_frequency(probability):
    drawn = np.asarray(draw_shuffle(keys(3), jnp.asarray(probability)))
    assert drawn.shape == (COUNT,)
    assert_frequency(drawn, probability)
