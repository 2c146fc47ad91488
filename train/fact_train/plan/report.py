"""The report of `fact-train plan`: as JSON, and as text for a person."""

import math
from collections.abc import Iterator
from typing import Any

from fact_train.chips import Chip
from fact_train.config import TrainConfig
from fact_train.plan.compilation import CompiledStats
from fact_train.plan.hlo import COLLECTIVES

TPU_RESERVED = 2**28  # bytes that the compiler leaves alone: it says 15.75 GiB of v5e's 16
GPU_USABLE = 0.92  # of a GPU's memory, when JAX is told to take that much
KINDS = ("frozen", "trainable", "optimizer", "ema", "batch", "temporary")
GB = 1e9
Report = dict[str, Any]


def make_report(config: TrainConfig, chip: Chip, chips: int, stats: CompiledStats) -> Report:
    """Everything that `plan` says, with plain numbers; bytes and FLOPs are those of one chip.

    Times are of compiled programs alone: of any other it is not known what a step reads and writes.
    """
    report = {
        "chip": chip.name,
        "chips": chips,
        "global_batch": config.batch_size,
        "samples_a_chip": config.batch_size / chips,
        "notes": stats["notes"],
        "parameters": stats["parameters"],
        "memory": _memory(config, chip, chips, stats),
        "flops": {"executed": stats["flops"] / chips, "model": stats["model_flops"] / chips},
        "collectives": stats["collectives"],
        "roofline": None,
        "assumptions": _assumptions(chip, stats),
        "seconds_to_plan": stats["seconds"],
    }
    if stats["accessed"] is None:  # there is no program to read
        return report
    arithmetic = stats["flops"] / chips / chip.peak
    traffic = stats["accessed"] / chip.bandwidth
    step = max(arithmetic, traffic)
    report["roofline"] = {
        "arithmetic_seconds": arithmetic,
        "memory_seconds": traffic,
        "memory_bytes": stats["accessed"],
        "step_seconds": step,
        "samples_a_second_a_chip": config.batch_size / chips / step,
        "bound_by": "arithmetic" if arithmetic >= traffic else "memory",
    }
    return report


def _memory(config: TrainConfig, chip: Chip, chips: int, stats: CompiledStats) -> Report:
    parts = {kind: stats["bytes"][kind] for kind in KINDS}
    used, usable = sum(parts.values()), chip.memory * GPU_USABLE
    if stats["compiled"]:
        usable = stats["usable"] or chip.memory - TPU_RESERVED
    fits = used <= usable
    return {
        "parts": parts,
        "used": used,
        "usable": usable,
        "estimated": not stats["compiled"],
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


def _assumptions(chip: Chip, stats: CompiledStats) -> list[str]:
    lines = [
        f"{chip.name}: {chip.peak / 1e12:.0f} TFLOP/s dense bfloat16, {chip.memory / GB:.1f} GB at "
        f"{chip.bandwidth / GB:.0f} GB/s ({chip.source})",
        "FLOPs: matrix products and convolutions of the traced step, loops in full, recomputation "
        "included; 'model' is without recomputation",
    ]
    if not stats["compiled"]:
        return [
            *lines,
            "activations: results that are live at one time in the traced order, unfused; "
            f"{GPU_USABLE:.0%} of the memory is taken to be usable "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION)",
            "collectives: one all-reduce of the gradients",
        ]
    lines += [
        "memory traffic: what every instruction of the compiled program reads and writes, "
        "loops in full, but for arrays that the compiler keeps on the chip",
        "collectives: read from the compiled program",
    ]
    if stats["accessed"] is not None:
        lines.append(
            "roofline: the larger of arithmetic at peak and memory traffic at full bandwidth, "
            "without collectives; real steps are slower"
        )
    return lines


def format_report(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    yield (
        f"{report['chips']} x {report['chip']}, global batch {report['global_batch']}: "
        f"{report['samples_a_chip']:g} samples a chip"
    )
    for note in report["notes"]:
        yield f"  note: {note}"
    yield from _memory_lines(report)
    flops, roofline = report["flops"], report["roofline"]
    yield (
        f"arithmetic a chip: {flops['executed'] / 1e12:.4g} TFLOP a step, "
        f"{flops['model'] / 1e12:.4g} of them the model's own"
    )
    if report["collectives"] is None:
        yield "collectives and step time: unknown, as the step does not compile"
    else:
        yield from _collective_lines(report)
        if roofline is None:
            yield "step time: unknown, as nothing is compiled for GPUs"
        else:
            yield (
                f"roofline: {_ms(roofline['step_seconds'])} a step, bound by "
                f"{roofline['bound_by']} (arithmetic {_ms(roofline['arithmetic_seconds'])}, memory "
                f"{_ms(roofline['memory_seconds'])} for {roofline['memory_bytes'] / GB:.4g} GB), "
                f"{roofline['samples_a_second_a_chip']:.3g} samples a second a chip"
            )
    yield "assumed"
    for line in report["assumptions"]:
        yield f"  {line}"
    yield verdict(report)


def _memory_lines(report: Report) -> Iterator[str]:
    memory, counts = report["memory"], report["parameters"]
    yield f"memory a chip{' (estimated)' if memory['estimated'] else ''}"
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


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
