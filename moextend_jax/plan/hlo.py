"""Reads a compiled program's text: HLO in, instructions by computation and how often each computation runs out.

The compiler's own totals count the body of a loop once. Here every computation has its number of executions per step:
trip counts multiply, and are read from the loops' conditions.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip


class Array(NamedTuple):
    """One array of a shape. `space` is its memory: 0 the chip's main memory (HBM), others are on-chip."""

    kind: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def nbytes(self) -> int:
        return int(self.size * BYTES.get(self.kind, 1))  # 8-bit floats have many names


class Instruction(NamedTuple):
    """`rest` is everything behind the operands: attributes, metadata, backend configuration."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def arrays(self) -> list[Array]:
        """The arrays of the result, those of a tuple in order."""
        return arrays(self.shape)

    @property
    def op_name(self) -> str:
        """Where in the Python program it came from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
        return match[1] if match else ""

    @property
    def layers(self) -> int:
        """For a kernel: its largest operand holds the weights of so many layers; it reads one's (`weights.reading`)."""
        match = re.search(r"one_of_(\d+)_layers", self.op_name)
        return int(match[1]) if match else 1

    @property
    def overlapped(self) -> str:
        """For a collective that a TPU overlaps with other kernels, as a part of each: "start" in the first of these,
        "on" in the others; "" for any other instruction."""
        match = re.search(r'"async_collective_fusion_config":\{[^}]*"flag_start":"(-?\d+)"', self.rest)
        return "" if match is None else "start" if match[1] == "-1" else "on"

    @property
    def aliases(self) -> list[tuple[int, int]]:
        """(place in the result, operand) of arrays that are the same memory."""
        match = re.search(r"output_to_operand_aliasing=\{((?:\{\d*\}: \(\d+, \{\d*\}\)(?:, )?)*)\}", self.rest)
        pairs = re.findall(r"\{(\d*)\}: \((\d+),", match[1]) if match else []
        return [(int(output or 0), int(operand)) for output, operand in pairs]

    def called(self, attribute: str) -> list[str]:
        """Names of computations in `attribute=%name` or `attribute={%name, ...}`."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"%?([\w.\-]+)", match[1].strip("{}")) if match else []


Computation = dict[str, Instruction]
FUSIONS = ("fusion", "fusion-start")
"""Kernels of several operations. XLA for GPU starts those that copy on another stream, as TPUs start copies."""


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


class Run(NamedTuple):
    """An instruction that runs `times` per step, in `computation`, which is called `where`. `op_name` is its own or, if
    the compiler lost it, that of the loop or fusion around it."""

    instruction: Instruction
    computation: Computation
    times: float
    where: str
    op_name: str


def arrays(shape: str) -> list[Array]:
    found = []
    for kind, dims, layout in re.findall(r"\b([a-z]+[0-9a-z]*)\[([\d,<=]*)\](\{[^}]*\})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Array(kind, sizes, int(space[1]) if space else 0))
    return found


def parse(text: str) -> Module:
    """An instruction may go over several lines: kernels carry notes with line breaks in them."""
    computations: dict[str, Computation] = {}
    entry, current, lines = "", None, []

    def finish() -> None:
        if current is not None and lines:
            instruction = _instruction(" ".join(lines))
            current[instruction.name] = instruction
        lines.clear()

    for line in text.splitlines():
        if line.endswith("{") and " -> " in line and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = computations.setdefault(name, {})
            entry = name if line.startswith("ENTRY ") else entry
        elif line == "}" or line.startswith("}, execution_thread"):
            finish()
            current = None
        elif re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            finish()
            lines.append(line)
        elif lines:
            lines.append(line)
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    left, right = re.sub(r"/\*.*?\*/", "", line).strip().split(" = ", 1)
    root = left.startswith("ROOT ")
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    start = right.index("(")
    stop = _closing(right, start)
    operands = tuple(re.findall(r"%([\w.\-]+)", right[start : stop + 1])) or tuple(
        part.strip().split(" ")[-1] for part in right[start + 1 : stop].split(",") if part.strip()
    )
    return Instruction(left.removeprefix("ROOT ").lstrip("%"), shape, right[:start], operands, right[stop + 1 :], root)


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if not depth:
            return index
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def runs(module: Module, *, unknown: Callable[[Instruction], float]) -> Iterator[Run]:
    """Every instruction with its number of executions; `unknown` answers for loops whose length depends on data.

    Branches of a conditional count as if each were taken equally often.
    """
    around = _around(module)
    for name, times in executions(module, unknown=unknown).items():
        computation = module.computations[name]
        for instruction in computation.values():
            yield Run(instruction, computation, times, name, instruction.op_name or around.get(name, ""))


def _around(module: Module) -> dict[str, str]:
    """For each computation the op_name of its caller, or of the caller's caller."""
    callers = {
        called: (one, name)
        for name, computation in module.computations.items()
        for one in computation.values()
        if one.opcode in ("while", *FUSIONS, "call", "async-start", "conditional")
        for attribute in ("body", "calls", "to_apply", "branch_computations")
        for called in one.called(attribute)
    }

    def op_name(computation: str) -> str:
        one, caller = callers.get(computation, (None, ""))
        return "" if one is None else one.op_name or op_name(caller)

    return {name: op_name(name) for name in callers}


def executions(module: Module, *, unknown: Callable[[Instruction], float]) -> dict[str, float]:
    counts: dict[str, float] = defaultdict(float)

    def visit(name: str, times: float) -> None:
        if name not in module.computations:
            return
        counts[name] += times
        computation = module.computations[name]
        for one in computation.values():
            if one.opcode == "while":
                trips = trip_count(module, computation, one)
                trips = unknown(one) if trips is None else trips
                visit(one.called("body")[0], times * trips)
            elif one.opcode == "conditional":
                branches = one.called("branch_computations") or [
                    *one.called("true_computation"), *one.called("false_computation")
                ]  # fmt: skip
                for branch in branches:
                    visit(branch, times / len(branches))
            elif one.opcode in (*FUSIONS, "async-start"):
                for called in one.called("calls"):
                    visit(called, times)
            elif one.opcode == "call":
                for called in one.called("to_apply"):
                    visit(called, times)

    visit(module.entry, 1.0)
    return dict(counts)


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where the data decide."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    start = computation.get(loop.operands[0])
    init = start.operands if start and start.opcode == "tuple" else ()

    def constant(name: str, inside: Computation) -> int | None:
        """The value of a scalar of the condition, or of what the loop starts with."""
        one = inside.get(name)
        while one and one.opcode in ("copy", "bitcast", "convert"):
            one = inside.get(one.operands[0])
        if one is None:
            return None
        if one.opcode == "constant":
            value = re.search(r"constant\((-?\d+)\)", f"constant({','.join(one.operands)})")
            return int(value[1]) if value else None
        if one.opcode == "get-tuple-element" and inside is not computation and init:
            index = re.search(r"index=(\d+)", one.rest)
            return constant(init[int(index[1])], computation) if index else None
        return None

    inside = module.computations.get(loop.called("condition")[0], {})
    root = next((one for one in inside.values() if one.root), None)
    if root is None:
        return None
    operands = list(root.operands)
    if root.opcode == "fusion":  # a condition wrapped: its parameters are the fusion's operands
        wrapped = module.computations[root.called("calls")[0]]
        compare = next((one for one in wrapped.values() if one.root), None)
        if compare is None:
            return None
        operands = []
        for name in compare.operands:
            one = wrapped[name]
            if one.opcode == "parameter":
                operands.append(root.operands[int(one.operands[0])])
            else:
                inside = {**inside, name: one}
                operands.append(name)
        root = compare
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    first, last = (constant(name, inside) for name in operands)
    return None if first is None or last is None else max(0, last - first)
