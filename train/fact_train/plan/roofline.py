"""Seconds from counts: the roofline of one step, and what more chips add to it."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from fact_train.plan.chips import Chip

HOP, NETWORK_HOP = 1e-6, 1e-5  # seconds to a neighbour in the slice, to another slice
# How often each array crosses a ring, in units of (n - 1) / n of its bytes.
PASSES = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "collective-permute": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one chip does in one step; ``traffic`` is bytes by kind of collective."""

    flops: float
    bytes: float
    traffic: Mapping[str, float]
    collectives: int


def compute_seconds(work: Work, chip: Chip) -> tuple[float, float]:
    """(arithmetic at peak, memory traffic at full bandwidth); the slower one is the roofline."""
    return work.flops / chip.peak, work.bytes / chip.bandwidth


def communication_seconds(work: Work, chip: Chip, chips: int) -> float:
    """Ring collectives over the chips, inside slices first and then between them.

    An all-reduce of B bytes over n chips moves 2 (n - 1) / n B bytes out of every chip. With
    several slices it is a reduce-scatter and an all-gather inside each (the same bytes) and, in
    between, an all-reduce of every chip's 1 / n share over the network.
    """
    inside = min(chips, chip.domain)
    slices = math.ceil(chips / chip.domain)
    crossing = sum(PASSES[kind] * size for kind, size in work.traffic.items())
    seconds = crossing * (inside - 1) / inside / chip.link
    latency = 2 * math.isqrt(inside) * HOP if inside > 1 else 0.0  # there and back on a 2D torus
    if slices > 1:
        if chip.network is None:
            raise ValueError(f"{chip.name}: no published bandwidth between slices")
        seconds += crossing * (slices - 1) / slices / inside / chip.network
        latency += 2 * (slices - 1) * NETWORK_HOP
    return seconds + work.collectives * latency


def scaling(work: Work, chip: Chip, counts: Sequence[int]) -> list[dict[str, float]]:
    """Weak scaling (the same batch a chip): seconds and efficiency against the first count.

    Nothing is overlapped: every collective starts when the arithmetic is over.
    """
    alone = max(compute_seconds(work, chip))
    rows = []
    for chips in counts:
        talking = communication_seconds(work, chip, chips)
        rows.append({"chips": chips, "communication": talking, "step": alone + talking})
    return [row | {"efficiency": rows[0]["step"] / row["step"]} for row in rows]
