"""From facts to a verdict: what a person reads, and the same as JSON."""

import math
from collections.abc import Iterator
from typing import Any

from fact_train.config import TrainConfig
from fact_train.plan.chips import Chip
from fact_train.plan.compilation import Facts
from fact_train.plan.roofline import PASSES, Work, compute_seconds, scaling

COUNTS = tuple(2**k for k in range(3, 13))  # 8 to 4,096 chips
TPU_RESERVED = 2**28  # bytes that the compiler leaves alone: it says 15.75 GiB of v5e's 16
GPU_USABLE = 0.92  # of a GPU's memory, when JAX is told to take that much
KINDS = ("frozen", "trainable", "optimizer", "ema", "batch", "temporary")
GB = 1e9
Report = dict[str, Any]


def make_report(config: TrainConfig, chip: Chip, chips: int, facts: Facts) -> Report:
    """Everything that `plan` says, with plain numbers; bytes and FLOPs are those of one chip.

    Times are of compiled programs alone: what a step reads and writes, which bounds it, is not
    known of any other.
    """
    report = {
        "chip": chip.name,
        "chips": chips,
        "global_batch": config.batch_size,
        "samples_a_chip": config.batch_size / chips,
        "notes": facts["notes"],
        "parameters": facts["parameters"],
        "memory": _memory(config, chip, chips, facts),
        "flops": {"executed": facts["flops"] / chips, "model": facts["model_flops"] / chips},
        "collectives": facts["collectives"],
        "roofline": None,
        "scaling": None,
        "assumptions": _assumptions(chip, facts),
        "seconds_to_plan": facts["seconds"],
    }
    if facts["accessed"] is None:  # there is no program to read
        return report
    work = _work(facts, chips)
    arithmetic, traffic = compute_seconds(work, chip)
    step = max(arithmetic, traffic)
    roofline = {
        "arithmetic_seconds": arithmetic,
        "memory_seconds": traffic,
        "memory_bytes": work.bytes,
        "step_seconds": step,
        "samples_a_second_a_chip": config.batch_size / chips / step,
        "bound_by": "arithmetic" if arithmetic >= traffic else "memory",
    }
    return report | {"roofline": roofline, "scaling": scaling(work, chip, COUNTS)}


def _work(facts: Facts, chips: int) -> Work:
    traffic = dict.fromkeys(PASSES, 0)
    for found in facts["collectives"]:
        traffic[found["kind"]] += found["bytes"] * found["times"]
    return Work(
        flops=facts["flops"] / chips,
        bytes=facts["accessed"],
        traffic=traffic,
        collectives=sum(found["times"] for found in facts["collectives"]),
    )


def _memory(config: TrainConfig, chip: Chip, chips: int, facts: Facts) -> Report:
    parts = {kind: facts["bytes"][kind] for kind in KINDS}
    if facts["compiled"]:
        used, usable = facts["used"], facts["usable"] or chip.memory - TPU_RESERVED
    else:
        used, usable = sum(parts.values()), chip.memory * GPU_USABLE
    fits = used <= usable
    return {
        "parts": parts,
        "used": used,
        "usable": usable,
        "estimated": not facts["compiled"],
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


def _assumptions(chip: Chip, facts: Facts) -> list[str]:
    lines = [
        f"{chip.name}: {chip.peak / 1e12:.0f} TFLOP/s dense bfloat16, {chip.memory / GB:.1f} GB at "
        f"{chip.bandwidth / GB:.0f} GB/s, links {chip.link / GB:.0f} GB/s one way among "
        f"{chip.domain} chips"
        + (f", {chip.network / GB:.3g} GB/s a chip beyond" if chip.network else "")
        + f" ({chip.source})",
        "FLOPs: matrix products and convolutions of the traced step, loops in full, recomputation "
        "included; 'model' is without recomputation",
    ]
    if facts["compiled"]:
        lines.append(
            "memory traffic: what every instruction of the compiled program reads and writes, "
            "loops in full, but for arrays that the compiler keeps on the chip"
        )
        lines.append("collectives: read from the compiled program")
    else:
        lines.append(
            "activations: results that are live at one time in the traced order, unfused; "
            f"{GPU_USABLE:.0%} of the memory is taken to be usable "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION)"
        )
        lines.append("collectives: one all-reduce of the gradients")
    if facts["accessed"] is None:
        return lines
    lines.append(
        "roofline: the larger of arithmetic at peak and memory traffic at full bandwidth; real "
        "steps are slower"
    )
    lines.append(
        "scaling: T(n) = roofline + sum over collectives of passes x bytes x (n-1)/n / link "
        "(passes: 2 for all-reduce, 1 for the others), between slices or nodes passes x bytes / "
        "chips in one x (s-1)/s / network; 1 us a hop inside, 10 us between; nothing overlapped"
    )
    return lines


def lines_of(report: Report) -> Iterator[str]:
    """The report as text."""
    yield (
        f"{report['chips']} x {report['chip']}, global batch {report['global_batch']}: "
        f"{report['samples_a_chip']:g} samples a chip"
    )
    for note in report["notes"]:
        yield f"  note: {note}"
    yield from _memory_lines(report)
    flops = report["flops"]
    yield (
        f"arithmetic a chip: {flops['executed'] / 1e12:.4g} TFLOP a step, "
        f"{flops['model'] / 1e12:.4g} of them the model's own"
    )
    if report["collectives"] is None:
        yield "collectives, step time and scaling: unknown, as the step does not compile"
    else:
        yield from _collective_lines(report)
        if report["roofline"] is None:
            yield "step time and scaling: unknown, as nothing is compiled for GPUs"
        else:
            yield from _time_lines(report)
    yield "assumed"
    for line in report["assumptions"]:
        yield f"  {line}"
    yield verdict(report)


def _memory_lines(report: Report) -> Iterator[str]:
    memory, counts = report["memory"], report["parameters"]
    yield f"memory a chip{' (estimated)' if memory['estimated'] else ''}"
    for kind, size in memory["parts"].items():
        many = f"   {counts[kind]:,} parameters" if kind in counts else ""
        yield f"  {kind:12s} {_gb(size)}{many}"
    yield f"  {'in all':12s} {_gb(memory['used'])} of {memory['usable'] / GB:.2f} GB usable"


def _collective_lines(report: Report) -> Iterator[str]:
    trained = report["memory"]["parts"]["trainable"]
    yield "collectives a step" + ("" if report["collectives"] else ": none")
    for kind in PASSES:
        rows = [found for found in report["collectives"] if found["kind"] == kind]
        if rows:
            sent = sum(found["bytes"] * found["times"] for found in rows)
            yield (
                f"  {sum(found['times'] for found in rows):4d} x {kind:18s} "
                f"{sent / 1e6:12.6f} MB in all, {sent / trained:7.2%} of what is trained"
            )


def _time_lines(report: Report) -> Iterator[str]:
    roofline = report["roofline"]
    yield (
        f"roofline: {_ms(roofline['step_seconds'])} a step, bound by {roofline['bound_by']} "
        f"(arithmetic {_ms(roofline['arithmetic_seconds'])}, memory "
        f"{_ms(roofline['memory_seconds'])} for {roofline['memory_bytes'] / GB:.4g} GB), "
        f"{roofline['samples_a_second_a_chip']:.3g} samples a second a chip"
    )
    yield "weak scaling (the same batch a chip)"
    yield "   chips   arithmetic or memory + communication = step      efficiency"
    for row in report["scaling"]:
        yield (
            f"  {row['chips']:6d}   {_ms(roofline['step_seconds'])} + "
            f"{_ms(row['communication'])} = {_ms(row['step'])}   {row['efficiency']:8.2%}"
        )


def verdict(report: Report) -> str:
    """'fits', or 'does not fit', by how much, and what to try."""
    memory = report["memory"]
    amount = f"{abs(memory['spare']) / GB:.2f} GB"
    if memory["fits"]:
        return f"fits, with {amount} to spare"
    return f"does not fit: {amount} too much; try {', or '.join(memory['try'])}"


def _gb(size: float) -> str:
    return f"{size / GB:10.4f} GB"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms"
