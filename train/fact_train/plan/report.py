"""The report of `fact-train plan`: as JSON, and as text for a person."""

import math
from collections.abc import Iterator
from typing import Any, TypedDict

from fact_jax.plan import roofline
from fact_jax.plan.chips import GB, Chip
from fact_jax.plan.hlo import COLLECTIVES
from fact_jax.plan.links import LINKS, collective_seconds
from fact_jax.plan.roofline import Roofline, milliseconds, usable_bytes
from fact_jax.plan.targets import GPUS_A_NODE
from fact_train.config import TrainConfig
from fact_train.tasks.validation import PEOPLE, SCALES, STARTS

KINDS = ("frozen", "trainable", "optimizer", "ema", "batch", "temporary")
Report = dict[str, Any]


class CompiledStats(TypedDict):
    """What is known of one training step.

    ``flops`` and ``model_flops`` are those of all devices, the rest is that of one:
    ``watched_flops`` of the pictures that are drawn now and then, None if never; ``bytes`` by what
    holds them; ``usable`` and what follows it as of a
    ``fact_jax.plan.compiled_program.CompiledProgram``.
    """

    notes: list[str]
    parameters: dict[str, int]
    bytes: dict[str, float]
    flops: int
    model_flops: int
    watched_flops: int | None
    usable: float | None
    accessed: int | None
    kernels: dict[str, int] | None
    collectives: list[dict[str, Any]] | None
    seconds: float


def make_report(config: TrainConfig, chip: Chip, chips: int, stats: CompiledStats) -> Report:
    """Everything that `plan` says, with plain numbers; bytes and FLOPs are those of one chip.

    There are no times where the step does not fit: then there is no program to read.
    """
    return {
        "chip": chip.name,
        "chips": chips,
        "global_batch": config.batch_size,
        "samples_a_chip": config.batch_size / chips,
        "notes": stats["notes"],
        "parameters": stats["parameters"],
        "memory": _memory(config, chip, chips, stats),
        "flops": {"executed": stats["flops"] / chips, "model": stats["model_flops"] / chips},
        "watching": _watching(config, chips, stats),
        "kernels": stats["kernels"],
        "collectives": stats["collectives"],
        "roofline": _roofline(config, chip, chips, stats),
        "assumptions": _assumptions(chip),
        "seconds_to_plan": stats["seconds"],
    }


def _roofline(config: TrainConfig, chip: Chip, chips: int, stats: CompiledStats) -> Report | None:
    """Bounds of a step's time; None where there is no program to read."""
    if stats["accessed"] is None:
        return None
    links, near = LINKS.get(chip.name), chips // config.mesh.slices
    if chip.is_gpu:
        near = min(near, GPUS_A_NODE)
    found = Roofline(
        stats["flops"] / chips / chip.peak,
        stats["accessed"] / chip.bandwidth,
        collective_seconds(stats["collectives"] or (), links, chips, near) if links else 0.0,
    )
    model = stats["model_flops"] / chips / chip.peak
    return {
        "arithmetic_seconds": found.arithmetic,
        "memory_seconds": found.memory,
        "memory_bytes": stats["accessed"],
        "collective_seconds": found.collectives,
        "step_seconds": [found.best, found.worst],
        "mfu": [model / found.best, model / found.worst],
        "samples_a_second_a_chip": config.batch_size / chips / found.best,
        "bound_by": found.bound_by,
    }


def _watching(config: TrainConfig, chips: int, stats: CompiledStats) -> Report | None:
    """What the pictures of ``log.samples_every`` cost beside the steps; None if there are none."""
    every, flops = config.log.samples_every, stats["watched_flops"]
    if not every or flops is None:
        return None
    return {
        "pictures": PEOPLE * len(STARTS) * len(SCALES),
        "every": every,
        "flops": flops,
        "share": flops / (flops + every * stats["flops"] / chips),
    }


def _memory(config: TrainConfig, chip: Chip, chips: int, stats: CompiledStats) -> Report:
    parts = {kind: stats["bytes"][kind] for kind in KINDS}
    used, usable = sum(parts.values()), stats["usable"] or usable_bytes(chip)
    fits = used <= usable
    return {
        "parts": parts,
        "used": used,
        "usable": usable,
        "fits": fits,
        "spare": usable - used,
        "try": [] if fits else suggestions(config, chips, parts, used, usable),
    }


def suggestions(
    config: TrainConfig, chips: int, parts: dict[str, float], used: float, usable: float
) -> list[str]:
    """What would make a step fit, the gentlest first."""
    here = config.batch_size // chips
    fixed = sum(parts[kind] for kind in ("frozen", "trainable", "optimizer", "ema"))
    a_sample = max(used - fixed, 1) / here
    most = math.floor((usable - fixed) / a_sample)
    tried = []
    if config.remat == "none":
        tried.append("remat=block (recompute each block in the backward pass)")
    rounds = [n for n in range(2, here + 1) if here % n == 0 and here // n <= most]
    if rounds:
        total = config.accumulate * rounds[0]
        tried.append(f"accumulate={total} (the same batch, {rounds[0]} times as many rounds)")
    if 1 <= most < here:
        tried.append(f"--global-batch {most * chips} ({most} samples a chip)")
    if config.mesh.fsdp == 1 and chips > 1:
        ways = math.gcd(chips, 8)
        moved = sum(parts[kind] for kind in ("trainable", "optimizer", "ema"))
        tried.append(f"mesh.fsdp={ways} (frees up to {moved * (1 - 1 / ways) / GB:.1f} GB a chip)")
    return tried or ["a chip with more memory"]


def _assumptions(chip: Chip) -> list[str]:
    return [
        *roofline.assumptions(chip),
        "FLOPs: matrix products, convolutions and attention kernels of the traced step, loops in "
        "full, recomputation included; 'model' is without recomputation",
        "pictures: those of the adapter's people to watch, each device some of them",
        "kernels and collectives: read from the compiled program",
        "step: at best arithmetic at peak, memory traffic and collectives at full bandwidth go on "
        "at one time, at worst one after the other",
        _link_line(chip),
        "MFU: the model's own FLOPs over the step's time and the peak",
    ]


def _link_line(chip: Chip) -> str:
    links = LINKS.get(chip.name)
    if links is None:
        return f"collectives take no time: the links between chips of {chip.name} are not known"
    return (
        f"links: {links.inside / GB:.4g} GB/s out of a chip within a slice or node, "
        f"{links.outside / GB:.4g} GB/s between them"
    )


def format_report(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    yield (
        f"{report['chips']} x {report['chip']}, global batch {report['global_batch']}: "
        f"{report['samples_a_chip']:g} samples a chip"
    )
    for note in report["notes"]:
        yield f"  note: {note}"
    yield from _memory_lines(report)
    flops, bounds = report["flops"], report["roofline"]
    yield (
        f"arithmetic a chip: {flops['executed'] / 1e12:.4g} TFLOP a step, "
        f"{flops['model'] / 1e12:.4g} of them the model's own"
    )
    if (watching := report["watching"]) is not None:
        yield (
            f"pictures: {watching['pictures']} every {watching['every']} steps, "
            f"{watching['flops'] / 1e12:.4g} TFLOP a chip, {watching['share']:.1%} of the whole"
        )
    if bounds is None:
        yield "kernels, collectives and step time: unknown, as the step does not compile"
    else:
        yield "kernels a step" + ("" if report["kernels"] else ": none")
        yield from (f"  {times:4d} x {name}" for name, times in report["kernels"].items())
        yield from _collective_lines(report)
        best, worst = map(milliseconds, bounds["step_seconds"])
        arithmetic = milliseconds(bounds["arithmetic_seconds"])
        memory = milliseconds(bounds["memory_seconds"])
        together = milliseconds(bounds["collective_seconds"])
        yield (
            f"a step: {best} to {worst}, bound by {bounds['bound_by']} (arithmetic {arithmetic}, "
            f"memory {memory} for {bounds['memory_bytes'] / GB:.4g} GB, collectives {together}); "
            f"at best {bounds['samples_a_second_a_chip']:.3g} samples a second a chip"
        )
        yield f"MFU: at most {bounds['mfu'][0]:.0%}, {bounds['mfu'][1]:.0%} without overlap"
    yield "assumed"
    for line in report["assumptions"]:
        yield f"  {line}"
    yield verdict(report)


def _memory_lines(report: Report) -> Iterator[str]:
    memory, counts = report["memory"], report["parameters"]
    yield "memory a chip"
    for kind, size in memory["parts"].items():
        many = f"   {counts[kind]:,} parameters" if kind in counts else ""
        yield f"  {kind:12s} {size / GB:10.4f} GB{many}"
    used, usable = memory["used"] / GB, memory["usable"] / GB
    yield f"  {'in all':12s} {used:10.4f} GB of {usable:.2f} GB usable"


def _collective_lines(report: Report) -> Iterator[str]:
    trained = report["memory"]["parts"]["trainable"]
    yield "collectives a step" + ("" if report["collectives"] else ": none")
    for kind in COLLECTIVES:
        rows = [found for found in report["collectives"] if found["kind"] == kind]
        if rows:
            sent = sum(found["bytes"] * found["times"] for found in rows)
            yield (
                f"  {sum(found['times'] for found in rows):4d} x {kind:18s} "
                f"{sent / 1e6:12.6f} MB in all, {sent / trained:7.2%} of what is trained"
            )


def verdict(report: Report) -> str:
    """'fits', or 'does not fit', by how much, and what to try."""
    memory = report["memory"]
    amount = f"{abs(memory['spare']) / GB:.2f} GB"
    if memory["fits"]:
        return f"fits, with {amount} to spare"
    return f"does not fit: {amount} too much; try {', or '.join(memory['try'])}"
