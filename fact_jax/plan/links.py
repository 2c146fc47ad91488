"""The least time that a program's collectives take over the links between chips.

Over a ring or a torus every chip sends each array once for a reduce-scatter or an all-gather, but
for its own part, and twice for an all-reduce, which is one after the other (Patarasuk & Yuan 2009).
Between slices (TPUs) or nodes (GPUs) it sends its own part of that again.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from fact_jax.plan.chips import GB


@dataclasses.dataclass(frozen=True)
class Links:
    """Bytes a second that a chip sends: within its slice or node, and out of it."""

    inside: float
    outside: float


# cloud.google.com/tpu/docs: half of the bidirectional bandwidth of the interconnect, and a chip's
# part of the data centre network. Datasheets of NVIDIA's DGX systems: half of NVLink's sum of both
# directions, and one network card for each GPU.
LINKS = {
    "v5e": Links(200 * GB, 25 / 8 * GB),
    "v5p": Links(600 * GB, 50 / 8 * GB),
    "v6e": Links(400 * GB, 100 / 8 * GB),
    "a100": Links(300 * GB, 200 / 8 * GB),
    "h100": Links(450 * GB, 400 / 8 * GB),
    "h200": Links(450 * GB, 400 / 8 * GB),
    "b200": Links(900 * GB, 400 / 8 * GB),
}


def collective_seconds(
    collectives: Iterable[Mapping[str, Any]], links: Links, devices: int, near: int
) -> float:
    """Of one step, on ``devices`` of which ``near`` share a slice or node.

    ``collectives`` as of :func:`fact_jax.plan.hlo.summarize`.
    """
    seconds = 0.0
    for row in collectives:
        group = row["group"] or devices
        # Of a group over the outer axes of the mesh not all that would fit are near.
        inside = max(min(group, near // row["stride"]), 1)
        rounds = 2 if row["kind"] == "all-reduce" else 1
        a_byte = (1 - 1 / inside) / links.inside + (1 - inside / group) / inside / links.outside
        seconds += rounds * row["bytes"] * row["times"] * a_byte
    return seconds
