"""Estimates and their intervals, on numbers small enough to check by hand."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from fact_jax.metrics.copying import copied_part, followed_part
from fact_jax.metrics.intervals import (
    Estimate,
    holm,
    mean_interval,
    paired_interval,
    person_means,
    ratio_interval,
    share_interval,
    two_way_interval,
    two_way_p,
)


def test_mean_interval_is_as_wide_as_the_normal_one_and_leaves_out_nan():
    values = np.arange(100.0) % 10
    estimate = mean_interval(np.append(values, math.nan))
    assert estimate.mean == pytest.approx(4.5)
    assert estimate.n == 100
    half = 1.96 * values.std() / 10
    assert estimate.low == pytest.approx(4.5 - half, abs=0.05)
    assert estimate.high == pytest.approx(4.5 + half, abs=0.05)


def test_interval_of_equal_values_is_a_point_and_of_none_is_empty():
    assert mean_interval(np.full(7, 0.25)) == Estimate(0.25, 0.25, 0.25, 7)
    empty = mean_interval(np.array([math.nan]))
    assert empty.n == 0
    assert math.isnan(empty.mean)


def test_ratio_is_of_the_means():
    estimate = ratio_interval(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    assert estimate == Estimate(0.5, 0.5, 0.5, 2)
    assert ratio_interval(np.array([1.0, 2.0]), np.array([1.0, 5.0])).mean == pytest.approx(0.5)


def test_wilson_interval_of_half_and_of_all():
    # By hand for 5 of 10: (0.5 + 0.19207) / 1.38415 = 0.5, and 0.26341 on both sides.
    estimate = share_interval(np.array([True, False] * 5))
    assert estimate.mean == 0.5
    assert estimate.low == pytest.approx(0.2366, abs=1e-4)
    assert estimate.high == pytest.approx(0.7634, abs=1e-4)
    everybody = share_interval(np.ones(10, bool))
    assert everybody.high == pytest.approx(1.0)
    assert everybody.low == pytest.approx(0.7225, abs=1e-4)


def test_estimate_goes_through_json_with_nan():
    estimate = Estimate(math.nan, 0.0, 1.0, 3)
    back = Estimate.from_dict(json.loads(json.dumps(estimate.to_dict(), allow_nan=False)))
    assert math.isnan(back.mean)
    assert back[1:] == estimate[1:]


def test_means_of_people_leave_out_what_is_not_known():
    values, people = np.array([1.0, 3.0, math.nan, 5.0, math.nan]), np.array([0, 0, 0, 2, 1])
    means = person_means(values, people)
    assert means[[0, 2]].tolist() == [2.0, 5.0]
    assert math.isnan(means[1])


def test_a_paired_statistic_draws_whole_people():
    reference = np.arange(12.0)
    base = reference[::-1] ** 2
    found = paired_interval(copied_part, 0.25 * reference + base, reference, base)
    # Whoever is drawn, the relation holds: the interval is a point.
    assert found[:3] == pytest.approx((0.25, 0.25, 0.25), abs=1e-9)
    # Of three people some draws show one alone, for whom there is no slope.
    few = paired_interval(followed_part, np.array([0.0, 1.1, 1.9]), np.array([0.0, 1.0, 2.0]))
    assert np.isnan(few.low)  # a ninth of the draws
    some = paired_interval(followed_part, np.arange(4) ** 1.1, np.arange(4.0))
    assert some.low < some.mean < some.high  # one in 64
    reference[3] = math.nan
    assert paired_interval(copied_part, base, reference, base).n == 11


def test_the_interval_over_seeds_and_people_holds_both():
    """Seeds alike: Student's over people. People alike: Student's over seeds, two free numbers."""
    draw = np.random.default_rng(1)
    people, seeds = draw.normal(size=(1, 200)), np.array([[-1.0], [0.0], [1.0]])
    alike = two_way_interval(np.repeat(people, 3, axis=0))
    wanted = stats.t.interval(0.95, 199, people.mean(), people.std(ddof=1) / 200**0.5)
    assert (alike.low, alike.high) == pytest.approx(wanted)
    apart = two_way_interval(np.zeros((1, 200)) + seeds)
    assert (apart.mean, apart.high) == pytest.approx((0.0, 4.302653 / 3**0.5), rel=1e-6)
    one = two_way_interval(people)
    assert one == pytest.approx(alike)
    assert one.n == 200
    assert two_way_interval(np.full((2, 3), np.nan)).n == 0
    assert two_way_interval(np.empty((0, 0))).n == 0
    constant = two_way_interval(np.full((3, 5), 0.1))
    assert constant[:3] == pytest.approx((0.1, 0.1, 0.1))


def test_a_p_value_is_where_its_interval_touches_zero():
    values = np.random.default_rng(2).normal(0.3, 1, size=(3, 40))
    found = two_way_interval(values)
    assert two_way_p(values - found.low) == pytest.approx(0.05)
    assert two_way_p(values * 0) == 1.0
    assert two_way_p(values * 0 + 1) == 0.0
    assert math.isnan(two_way_p(np.full((2, 3), np.nan)))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    with_none = holm([0.01, math.nan, 0.02])
    assert with_none[0] == pytest.approx(0.03)
    assert math.isnan(with_none[1])
    assert holm([]) == []
