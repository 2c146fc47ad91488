"""Seconds of collectives, by hand."""

import pytest

from fact_jax.plan.links import Links, collective_seconds

LINKS = Links(inside=100, outside=10)


def row(kind, size, group=0, times=1):
    return {"kind": kind, "bytes": size, "group": group, "times": times, "stride": 1}


def test_within_a_slice():
    gather = [row("all-gather", 800, times=2)]
    assert collective_seconds(gather, LINKS, 8, 8) == pytest.approx(2 * 800 * 7 / 8 / 100)
    assert collective_seconds([row("all-reduce", 800, group=4)], LINKS, 8, 8) == pytest.approx(
        2 * 800 * 3 / 4 / 100
    )
    assert collective_seconds([row("all-reduce", 800)], LINKS, 1, 1) == 0


def test_a_group_over_the_outer_axis_is_not_near():
    """Two nodes of four, pairs with one in each; four nodes of four, two of each node."""
    pairs = row("all-reduce", 800, group=2) | {"stride": 4}
    assert collective_seconds([pairs], LINKS, 8, 4) == pytest.approx(2 * 800 / 2 / 10)
    fours = row("all-gather", 800, group=8) | {"stride": 2}
    expected = 800 / 2 / 100 + 800 * (1 - 2 / 8) / 2 / 10
    assert collective_seconds([fours], LINKS, 16, 4) == pytest.approx(expected)


def test_between_slices_a_chip_sends_its_own_part():
    """Two slices of four: 800 bytes are scattered over four chips, whose 200 go to and fro."""
    found = collective_seconds([row("all-reduce", 800)], LINKS, 8, 4)
    assert found == pytest.approx(2 * (800 * 3 / 4 / 100 + 200 / 2 / 10))
