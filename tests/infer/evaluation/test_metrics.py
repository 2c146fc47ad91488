"""Measures on numbers small enough to check by hand."""

import json
import math

import numpy as np
import pytest

from fact_infer.evaluation.metrics import (
    COLUMNS,
    SECTIONS,
    Estimate,
    change,
    cosine,
    dilate,
    mean_interval,
    plain_table,
    rank_one,
    ratio_interval,
    share_interval,
)


def test_cosine_of_known_angles():
    a = np.array([[1.0, 0.0], [3.0, 4.0], [1.0, 1.0], [0.0, 0.0]])
    b = np.array([[0.0, 2.0], [6.0, 8.0], [-5.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0, 1, -math.sqrt(0.5), 0], atol=1e-12)


def test_rank_one_needs_the_own_row_to_be_strictly_nearest():
    gallery = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    queries = np.array([[2.0, 0.1], [1.0, 0.0], [1.0, 1.0]])
    assert rank_one(queries, gallery).tolist() == [True, False, True]
    tied = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert rank_one(tied, tied).tolist() == [False, False, True]


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


def test_change_is_the_same_both_ways():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 256, (2, 1, 4, 4, 3), np.uint8)
    mask = draw.random((1, 4, 4)) < 0.5
    assert change(a, b, mask) == change(b, a, mask)


def test_estimate_goes_through_json_with_nan():
    estimate = Estimate(math.nan, 0.0, 1.0, 3)
    back = Estimate.from_dict(json.loads(json.dumps(estimate.to_dict(), allow_nan=False)))
    assert math.isnan(back.mean)
    assert back[1:] == estimate[1:]


def test_table_shows_shares_in_percent_and_leaves_unknown_cells_blank():
    measures = {
        "rank_one/fact": Estimate(0.5, 0.25, 0.75, 4),
        "skin/base": Estimate(0.125, 0.1, 0.15, 4),
    }
    text = plain_table(measures, ["a note"])
    (rank,) = [line for line in text.splitlines() if "rank-1" in line]
    assert rank.split("photos")[1].strip() == "50 % [25, 75]"
    (skin,) = [line for line in text.splitlines() if line.strip().startswith("skin")]
    assert skin.split() == ["skin", "0.125", "[0.100,", "0.150]"]
    assert text.endswith("\n\na note\n")
    assert len({len(line) for line in text.splitlines() if "[" in line}) == 1
    assert len(COLUMNS) == 3
    assert len({row.key for rows in SECTIONS.values() for row in rows}) == sum(
        map(len, SECTIONS.values())
    )
