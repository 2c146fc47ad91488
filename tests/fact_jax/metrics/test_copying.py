"""What was copied from the reference: pose from points, light, and the copied part."""

import math

import numpy as np
import pytest

from fact_jax.metrics.copying import copied_part, followed_part, head_pose, light_side
from fact_jax.metrics.intervals import paired_interval

UPRIGHT = np.array([[0.0, 0.0], [10.0, 0.0], [5.0, 4.0], [2.0, 10.0], [8.0, 10.0]])


def test_pose_of_points_drawn_by_hand():
    turned = UPRIGHT.copy()
    turned[2] += (2.0, 1.0)
    pose = head_pose(np.stack([UPRIGHT, turned]))
    np.testing.assert_allclose(pose["roll"], 0.0)
    np.testing.assert_allclose(pose["yaw"], [0.0, 0.2])
    np.testing.assert_allclose(pose["pitch"], [0.4, 0.5])
    np.testing.assert_allclose(pose["mouth"], 0.6)


def test_pose_but_roll_knows_no_rotation_size_or_place():
    a = math.radians(20)
    rotation = 3 * np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])
    turned = UPRIGHT.copy()
    turned[2] += (2.0, 1.0)
    plain, moved = head_pose(turned[None]), head_pose((turned @ rotation + 7.0)[None])
    assert moved.pop("roll")[0] == pytest.approx(a)
    for name, value in moved.items():
        np.testing.assert_allclose(value, plain[name], atol=1e-12)


def test_light_from_the_right_is_positive():
    crops = np.zeros((3, 20, 20, 3), np.uint8)
    crops[0, :, 10:] = 100
    crops[1, :, 10:], crops[1, :, :10] = 60, 140
    np.testing.assert_allclose(light_side(crops), [1.0, -0.4, 0.0], atol=1e-12)


def test_copied_is_one_for_copies_and_zero_for_the_base():
    reference, base = np.random.default_rng(0).normal(size=(2, 9))
    assert copied_part(reference, reference, base) == 1.0
    assert copied_part(base, reference, base) == 0.0
    assert copied_part(0.3 * reference + 0.5 * base + 2, reference, base) == pytest.approx(0.3)
    # One base picture for everybody.
    assert copied_part(0.3 * reference, reference, np.full(9, 0.7)) == pytest.approx(0.3)
    assert followed_part(0.3 * reference + 2, reference) == pytest.approx(0.3)


@pytest.mark.parametrize(("planted", "least", "most"), [(0.5, 0.99, 1.0), (0.0, 0.0, 0.06)])
def test_planted_pose_is_found_among_96_people(planted, least, most, monkeypatch):
    """Half of the pose is the reference photo's, the rest by chance; or all of it is by chance."""
    monkeypatch.setattr("fact_jax.metrics.intervals.RESAMPLINGS", 1000)
    draw, found, runs = np.random.default_rng(3), 0, 400 if least else 200
    for _ in range(runs):
        reference, base, chance = draw.normal(size=(3, 96))
        value = planted * reference + (1 - planted) * chance
        found += paired_interval(copied_part, value, reference, base).low > 0
    assert least <= found / runs <= most
