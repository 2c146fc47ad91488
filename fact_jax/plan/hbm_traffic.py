"""The memory traffic of a compiled program, read from its text, loops in full.

Every instruction reads its operands and writes its result; a fusion is one instruction, and of what
is sliced only the slice is read. What the compiler keeps on the chip is marked in an array's layout
by a memory space, ``S(1)``, and costs nothing here. A library's scratch space costs nothing
either: nobody says what of it is used. The compiler's own figure knows neither of these, nor the
lengths of loops.
"""

import dataclasses
import re

from fact_jax.ops.attention_kernels import splash_tiles
from fact_jax.plan.hlo import ARRAY, array_bytes, computations, runs

_INSTRUCTION = re.compile(
    r"^\s*(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = "
    r"(?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)"
)
_NAME = re.compile(r"%([\w.\-]+)")
_FUSED = re.compile(r"calls=%?([\w.\-]+)")
# A `call` runs its computation as it stands; what others apply is part of themselves.
_INNER = re.compile(r"^(?!.* call\().*(?:calls|to_apply)=%?([\w.\-]+)", re.MULTILINE)
_LIBRARY = 'custom_call_target="__cu'
_CONSTRAINTS = re.compile(r"operand_layout_constraints=\{(.*?)\}, (?:frontend|custom|metadata|api)")
_KERNEL_NAME = re.compile(r"(splash_mha_(?:fwd|dkv))")
WHOLE = 2**62
_ALLOCATES = 'custom_call_target="AllocateBuffer"'
_SLICES = ("slice", "dynamic-slice")
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
    sizes: tuple[int, ...]  # and wherever it lies
    operands: tuple[str, ...]
    fused: str  # the computation of a fusion, else empty
    operand_shapes: tuple[tuple[int, ...], ...]  # of a kernel
    number: int | None  # of a parameter
    root: bool

    @property
    def bytes(self) -> int:
        return sum(self.arrays)


def hbm_bytes(text: str) -> int:
    """Bytes read from and written to a chip's main memory in one run of the program."""
    return _Program(text).traffic()


class _Program:
    def __init__(self, text: str):
        lines = dict(computations(text))
        self._runs = runs(lines)
        self._parts = {
            name: [one for line in body if (one := _parse(line)) is not None]
            for name, body in lines.items()
        }
        self._inner = set(_INNER.findall(text))

    def traffic(self) -> int:
        return sum(
            self._runs[name] * self._cost(part)
            for name, part in self._parts.items()
            if name not in self._inner
        )

    def _cost(self, part: list[_Instruction]) -> int:
        sizes = {one.name: one.bytes for one in part}
        shapes = {one.name: one.sizes for one in part}
        total = 0
        for one in part:
            if one.op in _FREE or one.op.endswith("-done"):
                continue
            inputs = tuple(size for name in one.operands for size in shapes.get(name, ()))
            if one.op in _SLICES:
                total += sum(one.sizes) + one.bytes
            elif one.op == "slice-start":
                # ((its operand), the slice, a flag)
                total += one.sizes[len(inputs)] + one.arrays[len(inputs)]
            elif one.op == "dynamic-update-slice":
                total += 2 * sizes.get(one.operands[1], 0)
            elif one.fused in self._parts:
                total += self._written(one)
                for i, name in enumerate(one.operands):
                    total += min(sizes.get(name, 0), self._read(one.fused, i))
            else:
                total += sum(_made(one, inputs)) + sum(sizes.get(name, 0) for name in one.operands)
                total += self._reread(one, sizes)
        return total

    def _reread(self, one: _Instruction, sizes: dict[str, int]) -> int:
        """What splash attention reads again: keys for each tile of queries, or the other way."""
        match = _KERNEL_NAME.match(one.name)
        if match is None:
            return 0
        q, k, v, *more = one.operands[2:]  # the first two are the mask's
        (*_, width, rows), (*_, keys) = one.operand_shapes[2:4]
        tiles = splash_tiles(rows, keys, width)
        parts = tiles.keys // tiles.on_chip
        if match[1] == "splash_mha_dkv":
            return (parts - 1) * sum(sizes.get(name, 0) for name in (q, *more))
        if parts == 1:
            return 0
        return (tiles.queries // tiles.forward - 1) * sum(sizes.get(name, 0) for name in (k, v))

    def _written(self, fusion: _Instruction) -> int:
        """Bytes that a fusion writes: of a result that is updated in place, the new part."""
        part = {one.name: one for one in self._parts[fusion.fused]}
        root = next((one for one in part.values() if one.root), None)
        if root is None:
            return fusion.bytes
        parts = root.operands if root.op == "tuple" else (root.name,)
        if len(parts) != len(fusion.arrays):
            return fusion.bytes
        return sum(
            min(array, self._updated(part, name))
            for array, name in zip(fusion.arrays, parts, strict=True)
        )

    def _updated(self, part: dict[str, _Instruction], name: str) -> int:
        one = part[name]
        while one.op == "bitcast" and one.operands[0] in part:
            one = part[one.operands[0]]
        if one.op == "dynamic-update-slice" and one.operands[1] in part:
            return part[one.operands[1]].bytes
        return one.bytes

    def _read(self, name: str, number: int) -> int:
        """Bytes that a fused computation reads of a parameter: perhaps slices only."""
        part = self._parts[name]
        source = next((one for one in part if one.number == number), None)
        return 0 if source is None else min(source.bytes, self._read_of(part, source.name))

    def _read_of(self, part: list[_Instruction], name: str) -> int:
        total = 0
        for user in part:
            for i, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.op == "bitcast":
                    total += self._read_of(part, user.name)
                elif user.op in _SLICES:
                    total += sum(user.sizes)
                elif user.fused in self._parts:
                    total += self._read(user.fused, i)
                elif user.op != "dynamic-update-slice" or i != 0:  # 0: written in place
                    return WHOLE
        return total


def _made(one: _Instruction, inputs: tuple[int, ...]) -> tuple[int, ...]:
    """Bytes of each array that an instruction writes.

    What starts something that runs beside other instructions gives back its operands before its
    result (a copy: after it).
    """
    if one.op == "copy-start":
        return one.arrays[:1]
    repeated = len(one.sizes) > len(inputs) and one.sizes[: len(inputs)] == inputs
    return one.arrays[len(inputs) :] if one.op.endswith("-start") and repeated else one.arrays


def _parse(line: str) -> _Instruction | None:
    match = _INSTRUCTION.match(line)
    if match is None:
        return None
    free, library = _ALLOCATES in line, _LIBRARY in line
    found = ARRAY.findall(match["shape"])
    sizes = tuple(array_bytes(*array) for array in found)
    arrays = tuple(
        0 if free or "S(" in layout or (library and dtype in ("s8", "u8")) else size
        for size, (dtype, _, layout) in zip(sizes, found, strict=True)
    )
    constraints = _CONSTRAINTS.search(line) if match["op"] == "custom-call" else None
    rest = match["rest"]
    inside = rest[: _closing(rest)]
    fused = _FUSED.search(rest) if match["op"] == "fusion" else None
    return _Instruction(
        name=match["name"],
        op=match["op"],
        arrays=arrays,
        sizes=sizes,
        operands=tuple(_NAME.findall(inside)),
        fused=fused[1] if fused else "",
        operand_shapes=tuple(
            tuple(int(size) for size in dims.split(",") if size)
            for _, dims, _ in ARRAY.findall(constraints[1] if constraints else "")
        ),
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
