"""Seconds by hand."""

import pytest

from fact_train.plan.chips import Chip
from fact_train.plan.roofline import Work, communication_seconds, compute_seconds, scaling

CHIP = Chip(
    name="toy",
    kinds=("toy",),
    peak=100.0,
    memory=1.0,
    bandwidth=10.0,
    link=8.0,
    domain=16,
    network=0.5,
    source="",
)


def work(flops=1000.0, size=50.0, collectives=0, **traffic):
    return Work(
        flops=flops,
        bytes=size,
        traffic={kind.replace("_", "-"): n for kind, n in traffic.items()},
        collectives=collectives,
    )


def test_roofline():
    assert compute_seconds(work(), CHIP) == (10.0, 5.0)


def test_ring_inside_a_slice():
    """64 B over 4 chips: each sends 2 * 3/4 * 64 = 96 B at 8 B/s; a gather sends half of it."""
    assert communication_seconds(work(all_reduce=64), CHIP, 4) == pytest.approx(12.0)
    assert communication_seconds(work(all_gather=64), CHIP, 4) == pytest.approx(6.0)
    assert communication_seconds(work(reduce_scatter=64), CHIP, 4) == pytest.approx(6.0)
    assert communication_seconds(work(all_reduce=64), CHIP, 1) == 0.0


def test_ring_between_slices():
    """64 chips are 4 slices of 16: inside 2 * 15/16 * 64 / 8, between 2 * 3/4 * (64/16) / 0.5."""
    assert communication_seconds(work(all_reduce=64), CHIP, 64) == pytest.approx(15.0 + 12.0)


def test_latency():
    """3 collectives on 16 chips (4 x 4): 2 * 4 hops of 1 us; two slices: 2 hops of 10 us more."""
    assert communication_seconds(work(collectives=3), CHIP, 16) == pytest.approx(24e-6)
    assert communication_seconds(work(collectives=3), CHIP, 32) == pytest.approx(84e-6)


def test_efficiency():
    rows = scaling(work(all_reduce=64), CHIP, (1, 4, 64))
    assert [row["chips"] for row in rows] == [1, 4, 64]
    assert [row["step"] for row in rows] == pytest.approx([10, 22, 37])
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 10 / 22, 10 / 37])
