"""The report of `fact-infer plan`: as JSON, and as text for a person."""

import math
from collections.abc import Iterator
from typing import Any, TypedDict

from fact_jax.plan import roofline
from fact_jax.plan.chips import GB, Chip
from fact_jax.plan.roofline import Roofline, milliseconds, usable_bytes
from fact_jax.plan.targets import slowdowns

FURTHEST = 4
"""The second batch that is compiled is at most so many times as large as the first: the TPU's
compiler takes long for large ones."""
Report = dict[str, Any]


class ProgramStats(TypedDict):
    """What is known of one program on one chip.

    ``flops`` are by what is multiplied (``fact_jax.plan.jaxpr_costs.flops_by_product``);
    ``needed`` are the bytes beside the weights while it runs. The rest is as of a
    ``fact_jax.plan.compiled_program.CompiledProgram``.
    """

    flops: dict[str, int]
    model_flops: int
    needed: float
    usable: float | None
    accessed: int | None
    kernels: dict[str, int] | None


class BatchStats(TypedDict):
    """Programs compiled for a batch. ``conditions``: bytes from the first program to the others."""

    batch: int
    conditions: int
    programs: dict[str, ProgramStats]


class PlanStats(TypedDict):
    """What the child finds: ``weights`` are bytes by model; ``calls`` are those of the UNet."""

    notes: list[str]
    parameters: dict[str, int]
    weights: dict[str, int]
    size: list[int]
    calls: int
    batches: list[BatchStats]
    seconds: float


def second_batch(first: BatchStats, weights: float, usable: float) -> int | None:
    """A second size of batch to compile, which tells how memory grows; None: there is none.

    It is the asked one times a power of two, near to what would fit if memory grew with the
    pictures; half of it where not even this fits.
    """
    batch = first["batch"]
    needed = max(program["needed"] for program in first["programs"].values())
    if weights + needed > usable:
        return batch // 2 or None
    times = min((usable - weights) / needed, FURTHEST)
    return batch * 2 ** max(math.floor(math.log2(times)), 1)


def largest_batch(batches: list[BatchStats], weights: float, usable: float) -> int:
    """The most pictures at a time: each program's memory on a straight line through both sizes."""
    if len(batches) == 1:
        return 0  # one picture does not fit
    first, second = sorted(batches, key=lambda one: one["batch"])
    most = []
    for name, program in first["programs"].items():
        more = second["programs"][name]["needed"] - program["needed"]
        a_picture = more / (second["batch"] - first["batch"])
        if a_picture > 0:
            spare = usable - weights - program["needed"]
            most.append(first["batch"] + math.floor(spare / a_picture))
    return max(min(most, default=second["batch"]), 0)


def make_report(chip: Chip, chips: int, stats: PlanStats) -> Report:
    """Everything that `plan` says, with plain numbers; bytes and FLOPs are those of one chip.

    There are no times where a program does not fit: then there is nothing to read.
    """
    asked, weights = stats["batches"][0], sum(stats["weights"].values())
    said = (program["usable"] for program in asked["programs"].values())
    usable = next(filter(None, said), usable_bytes(chip))
    runs = {"prepare": 1, "denoise": stats["calls"], "decode": 1}
    programs = {
        name: _program(chip, runs[name], program) for name, program in asked["programs"].items()
    }
    return {
        "chip": chip.name,
        "chips": chips,
        "batch": asked["batch"] * chips,
        "pictures_a_chip": asked["batch"],
        "size": stats["size"],
        "calls": stats["calls"],
        "notes": stats["notes"],
        "parameters": stats["parameters"],
        "memory": _memory(stats["weights"], asked, usable),
        "largest_batch": {
            "pictures": largest_batch(stats["batches"], weights, usable) * chips,
            "compiled": sorted(one["batch"] * chips for one in stats["batches"]),
        },
        "programs": programs,
        "roofline": _roofline(chip, programs, asked["batch"] * chips),
        "assumptions": _assumptions(chip),
        "seconds_to_plan": stats["seconds"],
    }


def _memory(weights: dict[str, int], batch: BatchStats, usable: float) -> Report:
    needed = {name: program["needed"] for name, program in batch["programs"].items()}
    largest = max(needed, key=lambda name: needed[name])
    parts: dict[str, float] = {**weights, "conditions": batch["conditions"]}
    parts["temporary"] = needed[largest] - batch["conditions"]
    used = sum(parts.values())
    return {
        "parts": parts,
        "largest_program": largest,
        "used": used,
        "usable": usable,
        "fits": used <= usable,
        "spare": usable - used,
    }


def _program(chip: Chip, runs: int, program: ProgramStats) -> Report:
    """One program; its bounds are those of one run."""
    slow = slowdowns(chip)
    arithmetic = sum(flops * slow.get(kind, 1.0) for kind, flops in program["flops"].items())
    found = {
        "runs": runs,
        "needed": program["needed"],
        "flops": program["flops"],
        "model_flops": program["model_flops"],
        "kernels": program["kernels"],
        "arithmetic_seconds": arithmetic / chip.peak,
    }
    if program["accessed"] is None:
        return found
    bounds = Roofline(arithmetic / chip.peak, program["accessed"] / chip.bandwidth)
    return found | {
        "memory_seconds": bounds.memory,
        "memory_bytes": program["accessed"],
        "seconds": [bounds.best, bounds.worst],
        "bound_by": bounds.bound_by,
    }


def _roofline(chip: Chip, programs: dict[str, Report], pictures: int) -> Report | None:
    """Bounds of a picture's time; None where a program could not be read."""
    if any("seconds" not in program for program in programs.values()):
        return None

    def total(value: str) -> float:
        return sum(program["runs"] * program[value] for program in programs.values())

    best, worst = (
        sum(program["runs"] * program["seconds"][i] for program in programs.values())
        for i in range(2)
    )
    model = total("model_flops") / chip.peak
    arithmetic, memory = total("arithmetic_seconds"), total("memory_seconds")
    return {
        "batch_seconds": [best, worst],
        "picture_seconds": [best / pictures, worst / pictures],
        "arithmetic_seconds": arithmetic,
        "memory_seconds": memory,
        "mfu": [model / best, model / worst],
        "bound_by": Roofline(arithmetic, memory).bound_by,
    }


def _assumptions(chip: Chip) -> list[str]:
    slow = slowdowns(chip)
    return [
        *roofline.assumptions(chip),
        f"products of float32 take {slow['float32']:.3g} times as long as those of 16 bits, with "
        f"--precision tf32 {slow['tf32']:.3g} times, and the autoencoder's beside 16-bit models "
        f"{slow.get('default', 1.0):.3g} times",
        "FLOPs: matrix products, convolutions and attention kernels of the traced programs, loops "
        "in full",
        "kernels: read from the compiled programs, in one run of each",
        "times: at best arithmetic at peak and memory traffic at full bandwidth go on at one time, "
        "at worst one after the other; without starting programs, the sampler's own arithmetic "
        "between them, and the photo's way to its crop",
        "MFU: the model's own FLOPs over the time and the peak of 16 bits",
    ]


def format_report(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    height, width = report["size"]
    yield (
        f"{report['chips']} x {report['chip']}, batch {report['batch']} of {width} x {height}: "
        f"{report['pictures_a_chip']} a chip, {report['calls']} calls of the UNet"
    )
    for note in report["notes"]:
        yield f"  note: {note}"
    memory, counts = report["memory"], report["parameters"]
    yield "memory a chip"
    for part, size in memory["parts"].items():
        many = f"   {counts[part]:,} parameters" if part in counts else ""
        many = f"   of {memory['largest_program']}" if part == "temporary" else many
        yield f"  {part:12s} {size / GB:10.4f} GB{many}"
    used, usable = memory["used"] / GB, memory["usable"] / GB
    yield f"  {'in all':12s} {used:10.4f} GB of {usable:.2f} GB usable"
    for name, program in report["programs"].items():
        yield from _program_lines(name, program)
    bounds = report["roofline"]
    if bounds is None:
        yield "time: unknown, as not every program compiles"
    else:
        best, worst = map(milliseconds, bounds["picture_seconds"])
        yield f"a picture: {best} to {worst}, bound by {bounds['bound_by']}"
        yield f"MFU: at most {bounds['mfu'][0]:.0%}, {bounds['mfu'][1]:.0%} without overlap"
    yield "assumed"
    for line in report["assumptions"]:
        yield f"  {line}"
    yield verdict(report)


def _program_lines(name: str, program: Report) -> Iterator[str]:
    flops = sum(program["flops"].values())
    line = f"{program['runs']} x {name}: {flops / 1e12:.4g} TFLOP"
    if "seconds" not in program:
        yield f"{line}; it does not compile"
        return
    best, worst = map(milliseconds, program["seconds"])
    yield (
        f"{line} and {program['memory_bytes'] / GB:.4g} GB, {best} to {worst}, bound by "
        f"{program['bound_by']}"
    )
    yield from (f"  {times:4d} x {kernel}" for kernel, times in program["kernels"].items())


def verdict(report: Report) -> str:
    """'fits', or 'does not fit', by how much, and how many pictures would."""
    memory, largest = report["memory"], report["largest_batch"]
    amount = f"{abs(memory['spare']) / GB:.2f} GB"
    fits = f"fits, with {amount} to spare" if memory["fits"] else f"does not fit: {amount} too much"
    if not largest["pictures"]:
        return f"{fits}; not even one picture a chip does"
    compiled = " and ".join(map(str, largest["compiled"]))
    return (
        f"{fits}; the largest batch is {largest['pictures']}, on a straight line through the "
        f"memory of programs compiled for {compiled}"
    )
