"""Captions: true, from a closed vocabulary, silent about the person."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fact_jax.portraits import GENERIC_CAPTION, VOCABULARY, captions, make_batch, sample_scene
from fact_jax.portraits.scene import Scene

FIELDS = dict.fromkeys(Scene._fields, 0)


def scene_of(**labels: int) -> Scene:
    return Scene(**{name: np.asarray([value]) for name, value in (FIELDS | labels).items()})


def test_captions_by_hand():
    labels = {"expression": 1, "glasses": 1, "shirt": 0, "background": 0, "pattern": 1}
    assert captions(scene_of(**labels)) == [
        "a portrait of a smiling person with round glasses wearing a red shirt"
        " on a blue striped background"
    ]
    assert captions(scene_of(phrasing=1, shirt=7)) == [
        "a neutral person in an orange shirt, a blue plain background"
    ]
    assert captions(scene_of(phrasing=2, glasses=2, expression=2)) == [
        "portrait of a person in a red shirt with square glasses, surprised,"
        " on a blue plain background"
    ]


def test_vocabulary_is_closed_and_used():
    lines = captions(sample_scene(jnp.arange(3000)))
    used = {word for line in [*lines, GENERIC_CAPTION] for word in re.findall(r"[^\s,]+|,", line)}
    assert used == set(VOCABULARY)


@pytest.mark.heavy
def test_the_caption_does_not_know_the_person():
    assert len(set(make_batch(range(12), [77] * 12).captions)) == 1


def test_scene_stays_within_its_bounds():
    scene = jax.tree.map(np.asarray, sample_scene(jnp.arange(2000)))
    assert np.abs(np.rad2deg(scene.roll)).max() <= 8.0
    assert 0.93 <= scene.scale.min() < 0.94
    assert 1.06 < scene.scale.max() <= 1.07
    assert np.abs(scene.shift_x).max() <= 2.0
    for name, count in (("expression", 3), ("glasses", 3), ("shirt", 8), ("background", 8)):
        assert set(getattr(scene, name)) == set(range(count)), name
