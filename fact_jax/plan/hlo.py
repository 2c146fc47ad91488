"""The collectives and kernels of a compiled program, read from its text."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*-> .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (?P<shape>.*?) (?P<kind>{'|'.join(COLLECTIVES)})(?P<start>-start)?\(")
# Between TPU slices: sent through the hosts by XLA's Megascale runtime, {slices}x{devices of each}.
_BETWEEN_SLICES = re.compile(
    r"= \((?P<shape>\w+\[[\d,]*\]).* send\(.*_xla_megascale_target=\"\{(?P<slices>[\d,:]+)\}"
    r"x\{(?P<devices>[\d,:]+)\}\".*_xla_megascale_transfer_type=\"(?P<kind>\w+)\""
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_ROUNDS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
_KERNEL = re.compile(
    r"%(?P<name>[\w\-]+?)[\d.]* = .* custom-call\(.*custom_call_target=\"(?P<target>[^\"]+)\""
)
_TILE = re.compile(r"\{(?P<order>[\d,]+):T\((?P<tile>[\d,]+)\)")
ARRAY = re.compile(
    r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\](\{[^}]*\})?"
)  # type, dimensions, layout
# [2,4]<=[8], [4,2]<=[2,4]T(1,0), {{0,1},{2,3}}, or mesh['x'=4,'y'=2] {'y'}
_GROUPS = re.compile(
    r"replica_groups=(?:\[\d+,(?P<size>\d+)\]<=\[(?P<dims>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
    r"|\{\{(?P<first>[\d,]+)\}|mesh\[(?P<mesh>[^\]]*)\] ?\{(?P<axes>[^}]*)\})"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One instruction: bytes of the whole (unscattered, gathered) arrays, on one device, a time.

    ``group`` is how many devices take part (0: all), every ``stride``-th in the mesh's order;
    ``times`` how often a step runs it.
    """

    kind: str
    bytes: int
    arrays: int
    group: int
    times: int
    stride: int = 1


def read_collectives(text: str) -> list[Collective]:
    """Every collective of a program's text.

    A reduce-scatter of the TPU compiler stands as an all-reduce inside a fused computation named
    ``all-reduce-scatter``. What is in a loop's body is run as often as the loop's condition says
    (once where it does not say).
    """
    parts = dict(computations(text))
    times = runs(parts)
    found = []
    for name, lines in parts.items():
        for line in lines:
            if (match := _BETWEEN_SLICES.search(line)) is not None:
                found.append(_between_slices(match, times[name]))
            if (match := _COLLECTIVE.search(line)) is None:
                continue
            kind, (group, stride) = match["kind"], _group(line)
            sizes = [array_bytes(*array[:2]) for array in ARRAY.findall(match["shape"])]
            payload = sum(sizes)
            if match["start"] and kind == "all-gather":  # (what goes in, what comes out)
                payload, sizes = payload * group // (group + 1), sizes[len(sizes) // 2 :]
            if match["start"] and kind == "collective-permute":
                payload, sizes = sizes[0], sizes[:1]
            if match["start"] and kind == "reduce-scatter":  # as of an all-gather
                sizes = sizes[len(sizes) // 2 :]
                payload = sum(sizes)
            if kind == "reduce-scatter":
                payload *= group
            if kind == "all-reduce" and "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            found.append(
                Collective(
                    kind=kind,
                    bytes=payload,
                    arrays=len(sizes),
                    group=group,
                    times=times[name],
                    stride=stride,
                )
            )
    return found


def _between_slices(match: re.Match[str], times: int) -> Collective:
    """What each device of a slice sends to those of the same number in the others."""
    (array,), slices = ARRAY.findall(match["shape"]), _count(match["slices"])
    kind, payload = match["kind"].lower().replace("_", "-"), array_bytes(*array[:2])
    return Collective(
        kind=kind,
        bytes=payload * slices if kind == "all-gather" else payload,
        arrays=1,
        group=slices,
        times=times,
        stride=_count(match["devices"]),
    )


def _count(ranges: str) -> int:
    """How many numbers there are in ``0:255`` or ``1,2,5:8``."""
    pairs = ([*map(int, part.split(":"))] for part in ranges.split(","))
    return sum(pair[-1] - pair[0] + 1 for pair in pairs)


def read_kernels(text: str) -> dict[str, int]:
    """How often a step runs each kernel of a library or of Pallas, by name."""
    parts = dict(computations(text))
    times = runs(parts)
    found: collections.Counter[str] = collections.Counter()
    for name, lines in parts.items():
        for match in filter(None, map(_KERNEL.search, lines)):
            if match["target"] == "tpu_custom_call":
                found[match["name"]] += times[name]
            elif match["target"].startswith("__"):
                found[match["target"]] += times[name]
    return dict(sorted(found.items()))


def summarize(collectives: list[Collective]) -> list[dict[str, Any]]:
    """Collectives as JSON, those that are alike together, the largest first."""
    counted: collections.Counter[Collective] = collections.Counter()
    for one in collectives:
        counted[dataclasses.replace(one, times=0)] += one.times
    rows = [dataclasses.asdict(one) | {"times": times} for one, times in counted.items()]
    return sorted(rows, key=lambda row: -row["bytes"] * row["times"])


def computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """(name, its lines) of every computation."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if (match := _COMPUTATION.match(line)) is not None:
            name, lines = match["name"], []
        elif line.rstrip() == "}" and name:
            yield name, lines
            name = ""
        elif name and line.startswith("  "):
            lines.append(line)
        elif name and lines:  # a kernel's own description goes over several lines
            lines[-1] += line


def runs(parts: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs in a step."""
    callers: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for name, lines in parts.items():
        for line in lines:
            loop = _WHILE.search(line)
            for called in _called(line):
                rounds = _rounds(line, parts.get(loop[1], [])) if loop else 1
                callers[called].append((name, rounds))
    known: dict[str, int] = {}

    def times(name: str) -> int:
        if name not in known:
            known[name] = sum(times(caller) * n for caller, n in callers[name]) or 1
        return known[name]

    return {name: times(name) for name in parts}


def _called(line: str) -> list[str]:
    branches = _BRANCHES.search(line)
    inside = [part.strip(" %") for part in branches[1].split(",")] if branches else []
    return _CALLED.findall(line) + inside


def _rounds(line: str, condition: list[str]) -> int:
    if (match := _ROUNDS.search(line)) is not None:
        return int(match[1])
    constants = [int(found[1]) for text in condition if (found := _CONSTANT.search(text))]
    return max(constants, default=1)


def _group(line: str) -> tuple[int, int]:
    """Size of the groups, and the stride between the first two devices of the first one."""
    match = _GROUPS.search(line)
    if match is None:
        return 0, 1
    if match["axes"]:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match["mesh"])}
        own = re.findall(r"'(\w+)'", match["axes"])
        members = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        rest = [axis for axis, name in enumerate(sizes) if name not in own]
        members = members.transpose(*rest, *map([*sizes].index, own))
        members = members.reshape(-1, math.prod(sizes[name] for name in own))[0]
    elif match["first"]:
        members = np.array(_numbers(match["first"]))
    else:
        dims = _numbers(match["dims"])
        order = _numbers(match["order"]) if match["order"] else range(len(dims))
        members = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1)
        members = members[: int(match["size"])]
    return len(members), int(members[1] - members[0]) if len(members) > 1 else 1


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def array_bytes(dtype: str, dims: str, layout: str = "") -> int:
    """Bytes of an array as it lies in memory: whole tiles, where the layout has any."""
    bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
    sizes = [int(size) for size in filter(None, dims.split(","))]
    if (match := _TILE.match(layout)) is not None:
        minor_first = [int(axis) for axis in match["order"].split(",")]
        tile = [int(size) for size in match["tile"].split(",")]
        for axis, size in zip(minor_first, reversed(tile), strict=False):
            sizes[axis] = -(-sizes[axis] // size) * size
    return math.prod(sizes) * bits // 8
