"""The memory traffic of a compiled TPU program, read from its text, loops in full.

Every instruction reads its operands and writes its result; a fusion is one instruction. What the
compiler keeps on the chip is marked in an array's layout by a memory space, ``S(1)``, and costs
nothing here. The compiler's own figure knows neither that nor the lengths of loops.
"""

import dataclasses
import re

from train.plan.hlo import ARRAY, array_bytes, computations, runs

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = "
    r"(?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
_FREE = {
    "after-all",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    op: str
    arrays: tuple[int, ...]  # bytes of each array of the result in the chip's main memory
    operands: tuple[str, ...]
    fused: str | None
    number: int | None  # of a parameter
    root: bool

    @property
    def bytes(self) -> int:
        return sum(self.arrays)


def count_traffic(text: str) -> int:
    """Bytes read from and written to a chip's main memory in one run of the program."""
    return _Program(text).traffic()


class _Program:
    def __init__(self, text: str):
        lines = dict(computations(text))
        self._runs = runs(lines)
        self._parts = {
            name: [one for line in body if (one := _read(line)) is not None]
            for name, body in lines.items()
        }
        self._inner = set(re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", text))

    def traffic(self) -> int:
        return sum(
            self._runs[name] * self._cost(part)
            for name, part in self._parts.items()
            if name not in self._inner
        )

    def _cost(self, part: list[_Instruction]) -> int:
        sizes = {one.name: one.bytes for one in part}
        total = 0
        for one in part:
            if one.op in _FREE or one.op.endswith("-done"):
                continue
            if one.op == "dynamic-slice":
                total += 2 * one.bytes
            elif one.op == "dynamic-update-slice":
                total += 2 * sizes.get(one.operands[1], 0)
            elif one.fused in self._parts:
                reads, written = self._fusion(one.fused)
                total += one.bytes if written is None else min(written, one.bytes)
                for i, name in enumerate(one.operands):
                    total += min(sizes.get(name, 0), reads.get(i, sizes.get(name, 0)))
            else:
                # What starts a copy gives back its source beside its result.
                result = one.arrays[0] if one.op == "copy-start" else one.bytes
                total += result + sum(sizes.get(name, 0) for name in one.operands)
        return total

    def _fusion(self, name: str) -> tuple[dict[int, int], int | None]:
        """(bytes read of the parameters of which only slices are read, bytes written if slices)."""
        part = self._parts[name]
        by_name = {one.name: one for one in part}
        users: dict[str, list[_Instruction]] = {}
        for one in part:
            for operand in one.operands:
                users.setdefault(operand, []).append(one)

        def uses(name: str) -> list[_Instruction]:
            found = []
            for user in users.get(name, []):
                found += uses(user.name) if user.op == "bitcast" else [user]
            return found

        reads = {}
        for one in part:
            if one.number is None:
                continue
            consumers = uses(one.name)
            if consumers and all(user.op == "dynamic-slice" for user in consumers):
                reads[one.number] = sum(user.bytes for user in consumers)
            elif consumers and all(user.op == "dynamic-update-slice" for user in consumers):
                reads[one.number] = 0  # written in place
        root = next((one for one in part if one.root), part[-1])
        while root.op == "bitcast" and root.operands[0] in by_name:
            root = by_name[root.operands[0]]
        if root.op != "dynamic-update-slice":
            return reads, None
        update = by_name.get(root.operands[1])
        return reads, update.bytes if update else None


def _read(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    arrays = tuple(
        0 if "S(" in layout else array_bytes(dtype, dims)
        for dtype, dims, layout in ARRAY.findall(match["shape"])
    )
    rest = match["rest"]
    inside = rest[: _closing(rest)]
    fused = _FUSED.search(rest) if match["op"] == "fusion" else None
    return _Instruction(
        name=match["name"],
        op=match["op"],
        arrays=arrays,
        operands=tuple(_NAME.findall(inside)),
        fused=fused[1] if fused else None,
        number=int(inside) if match["op"] == "parameter" else None,
        root=match["root"] is not None,
    )


def _closing(text: str) -> int:
    """Where the parenthesis ends that is open at the beginning."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i
    return len(text)
