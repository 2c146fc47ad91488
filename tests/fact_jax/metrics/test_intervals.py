"""Estimates and their intervals, on numbers small enough to check by hand."""

import json
import math

import numpy as np
import pytest

from fact_jax.metrics.copying import copied_part, followed_part
from fact_jax.metrics.intervals import (
    Estimate,
    mean_interval,
    paired_interval,
    person_means,
    ratio_interval,
    share_interval,
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
