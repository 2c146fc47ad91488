"""Metrics of pictures on arrays small enough to check by hand."""

import math

import numpy as np
import pytest

from fact_jax.metrics.pictures import change, dilate, diversity, fid, kid, latent_change


def test_dilate_grows_by_one_pixel_to_eight_sides():
    mask = np.zeros((1, 4, 5), bool)
    mask[0, 0, 2] = True
    grown = dilate(mask)[0]
    expected = np.zeros((4, 5), bool)
    expected[:2, 1:4] = True
    assert (grown == expected).all()


def test_change_inside_and_outside_of_a_mask():
    a = np.zeros((2, 2, 3, 3), np.uint8)
    b = a.copy()
    mask = np.zeros((2, 2, 3), bool)
    mask[0, 0] = True  # three of six pixels
    b[0, 0, 0] = (51, 0, 0)  # a fifteenth over the channels
    b[0, 1, 2] = 255
    inside, outside = change(a, b, mask)
    assert inside[0] == pytest.approx(51 / 3 / 255 / 3)
    assert outside[0] == pytest.approx(1 / 3)
    assert math.isnan(inside[1])
    assert outside[1] == 0


def test_a_soft_mask_counts_on_both_sides_by_its_parts():
    """One picture of 2 x 2: 51 / 255 = 0.2 where the mask is 1, 0.4 in one of the other cells."""
    base = np.zeros((1, 2, 2, 3), np.uint8)
    fact = base.copy()
    fact[0, 0, 0] = 51
    fact[0, 1, 1] = 102
    inside, outside = change(base, fact, np.array([[[1.0, 0], [0, 0.5]]]))
    assert inside[0] == pytest.approx((0.2 + 0.5 * 0.4) / 1.5)
    assert outside[0] == pytest.approx(0.5 * 0.4 / 2.5)
    inside, _ = change(base, fact, np.array([[[0.2, 0], [0, 0]]]))
    assert inside[0] == pytest.approx(0.2)


def test_change_is_the_same_both_ways():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 256, (2, 1, 4, 4, 3), np.uint8)
    mask = draw.random((1, 4, 4)) < 0.5
    assert change(a, b, mask) == change(b, a, mask)


def test_latents_change_in_parts_of_the_base_outside_the_face():
    base = np.zeros((2, 1, 2, 2))
    base[:, 0, 0] = (3.0, 4.0)  # outside, of length 5
    base[:, 0, 1] = 9.0
    fact = base.copy()
    fact[1, 0, 0] += (0.0, 2.0)
    fact[:, 0, 1] = 1.0  # inside: does not count
    outside = np.array([[[1.0, 0.0]], [[1.0, 0.0]]])
    assert latent_change(fact, base, outside).tolist() == [0.0, 0.4]
    assert math.isnan(latent_change(fact, base, 0 * outside)[0])


def test_diversity_is_the_mean_over_pairs():
    pixels = np.array([[0.0, 0.0], [0.2, 0.4], [0.2, 0.0]])  # apart: 0.3, 0.1, 0.2
    assert diversity(pixels, "absolute") == pytest.approx(0.2)
    features = np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert diversity(features) == pytest.approx((0 + 1 + 1) / 3)
    assert math.isnan(diversity(features[:1]))


def test_kid_of_three_numbers():
    # k(a, b) = (ab + 1)^3. Within x = 0, 1, 2: pairs 1, 1, 27; within y = 1, 1, 0: 8, 1, 1;
    # between different rows: x0 y: 1, 1; x1 y: 8, 1; x2 y: 27, 27. Means: 29/3 + 10/3 - 2 65/6.
    x, y = np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [1.0], [0.0]])
    found = kid(x, y)
    assert found.mean == pytest.approx(29 / 3 + 10 / 3 - 65 / 3)
    assert found.low < found.mean < found.high
    assert kid(x, x).mean == pytest.approx(0.0)


def test_kid_is_unbiased_and_its_interval_right():
    draw = np.random.default_rng(0)
    found = [kid(*draw.normal(size=(2, 30, 4))) for _ in range(300)]
    means = np.array([one.mean for one in found])
    assert abs(means.mean()) < 3 * means.std() / math.sqrt(300)
    assert np.mean([one.low <= 0 <= one.high for one in found]) > 0.88


def test_frechet_distance_of_gaussians():
    # Of one dimension: (difference of means)^2 + (difference of deviations)^2.
    x = np.array([[0.0], [2.0]])  # mean 1, deviation sqrt 2
    y = np.array([[1.0], [9.0]])  # mean 5, deviation sqrt 32
    assert fid(x, y) == pytest.approx(16 + (math.sqrt(32) - math.sqrt(2)) ** 2)
    draw = np.random.default_rng(1).normal(size=(50, 6))
    assert fid(draw, draw) == pytest.approx(0.0, abs=1e-9)
    assert fid(draw, draw + 2.0) == pytest.approx(24.0)
