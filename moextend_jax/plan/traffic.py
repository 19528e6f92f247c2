"""Bytes that a compiled program moves to and from a chip's memory: its text in, bytes per step out.

Every kernel (fusion, product, copy) reads its operands and writes its result; what stays on the chip is free, and of
an array from which a kernel only takes a slice, only the slice counts.
"""

from __future__ import annotations

from collections.abc import Callable

from moextend_jax.plan.hlo import FUSIONS, Array, Computation, Instruction, Module, executions

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "async-start", "async-update", "async-done", "partition-id", "iota", "opt-barrier",
}  # fmt: skip
SLICES = {"dynamic-slice", "gather", "slice"}


def traffic(module: Module, *, unknown: Callable[[Instruction], float]) -> float:
    fused = {
        name
        for computation in module.computations.values()
        for one in computation.values()
        if one.opcode in FUSIONS
        for name in one.called("calls")
    }
    total = 0.0
    for name, times in executions(module, unknown=unknown).items():
        if name not in fused:
            computation = module.computations[name]
            total += times * sum(_moved(one, computation, module) for one in computation.values())
    return total


def _moved(one: Instruction, computation: Computation, module: Module) -> float:
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    read = [_nbytes(computation[operand]) if operand in computation else 0.0 for operand in one.operands]
    if one.opcode == "dynamic-update-slice":
        return read[1] + _slice(computation[one.operands[1]], of=one)
    if one.opcode in SLICES:
        return _slice(one, of=computation.get(one.operands[0])) + _nbytes(one)
    if one.opcode in FUSIONS:
        return _moved_by_fusion(one, read, module)
    if one.opcode.endswith("-start") and one.shape.startswith("("):
        return _nbytes(one)  # its shape lists what is read and what is written
    largest = max(read, default=0.0)
    return _nbytes(one) + sum(read) - largest + largest / one.layers


def _moved_by_fusion(one: Instruction, read: list[float], module: Module) -> float:
    inside = module.computations[one.called("calls")[0]]
    written = _updated(inside)
    if written is None:
        # The shape of a kernel that is only started names its operands too.
        result = next((line for line in inside.values() if line.root), one) if one.opcode == FUSIONS[1] else one
        written = _nbytes(result)
    if any(part.overlapped for part in inside.values()):  # a collective's aliased arrays are only passed on
        written -= sum(_in_memory(one.arrays[output]) for output, _ in one.aliases)
        waiting = {operand for _, operand in one.aliases}
        read = [0.0 if index in waiting else whole for index, whole in enumerate(read)]
    return written + sum(_read(_parameter(inside, index), inside, module, whole) for index, whole in enumerate(read))


def _nbytes(one: Instruction) -> float:
    return sum(map(_in_memory, one.arrays))


def _in_memory(array: Array) -> float:
    return array.nbytes if array.space == 0 else 0.0


def _slice(one: Instruction, *, of: Instruction | None) -> float:
    """Bytes of a slice, where what it is taken from, or put into, is in memory."""
    return sum(array.nbytes for array in one.arrays) if of and _nbytes(of) else 0.0


def _parameter(inside: Computation, index: int) -> set[str]:
    return {one.name for one in inside.values() if one.opcode == "parameter" and one.operands == (str(index),)}


def _read(names: set[str], inside: Computation, module: Module, whole: float) -> float:
    """Bytes that a fusion reads of an operand of `whole` bytes, which has these names inside it: `whole`, unless it is
    known to take less."""
    users = [one for one in inside.values() if names & set(one.operands)]
    total = 0.0 if users else whole
    for one in users:
        places = [place for place, operand in enumerate(one.operands) if operand in names]
        if one.opcode == "bitcast":
            total += _read({one.name}, inside, module, whole)
        elif one.opcode in SLICES and places == [0]:
            total += sum(array.nbytes for array in one.arrays)
        elif one.opcode == "dynamic-update-slice" and places == [0]:
            continue  # written in place
        elif one.opcode in FUSIONS:
            called = module.computations[one.called("calls")[0]]
            total += sum(_read(_parameter(called, place), called, module, whole) for place in places)
        else:
            total += whole
    return min(whole, total)


def _updated(inside: Computation) -> float | None:
    """Bytes that a fusion writes where it only updates a slice of its operand; None where it writes all."""
    root = next((one for one in inside.values() if one.root), None)
    while root and root.opcode == "bitcast":
        root = inside.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return None
    return float(sum(array.nbytes for array in inside[root.operands[1]].arrays))
