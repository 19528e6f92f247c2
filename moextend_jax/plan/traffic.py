"""Bytes that a compiled program moves to and from a chip's memory: its text in, bytes per step out.

Every kernel (fusion, product, copy) reads its operands and writes its result; what stays on the chip is free, and of
an array from which a kernel only takes a slice, only the slice counts.
"""

from __future__ import annotations

from collections.abc import Callable

from moextend_jax.plan.hlo import FUSIONS, Computation, Instruction, Module, executions

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
    inside = module.computations.get(one.called("calls")[0]) if one.opcode in FUSIONS else None
    written = None if inside is None else _updated(inside)
    if one.opcode == "dynamic-update-slice":
        return 2.0 * _nbytes(computation[one.operands[1]])
    if one.opcode in SLICES:
        return 2.0 * _nbytes(one)
    # The shape of a kernel that is only started names its operands too.
    result = next((line for line in (inside or {}).values() if line.root), one) if one.opcode == FUSIONS[1] else one
    total = _nbytes(result) if written is None else written
    read = [_nbytes(computation[operand]) if operand in computation else 0.0 for operand in one.operands]
    if inside is not None:
        return total + sum(min(whole, _read(index, inside, whole)) for index, whole in enumerate(read))
    largest = max(read, default=0.0)
    return total + sum(read) - largest + largest / one.layers


def _nbytes(one: Instruction) -> float:
    return sum(array.nbytes for array in one.arrays if array.space == 0)


def _read(index: int, inside: Computation, whole: float) -> float:
    """Bytes that a fusion reads of its operand."""
    names = {one.name for one in inside.values() if one.opcode == "parameter" and one.operands == (str(index),)}
    users = [one for one in inside.values() if names & set(one.operands)]
    while users and all(one.opcode == "bitcast" for one in users):
        names = {one.name for one in users}
        users = [one for one in inside.values() if names & set(one.operands)]
    if users and all(one.opcode in SLICES and one.operands[0] in names for one in users):
        return sum(array.nbytes for one in users for array in one.arrays)
    if users and all(one.opcode == "dynamic-update-slice" and one.operands[0] in names for one in users):
        return 0.0  # written in place
    return whole


def _updated(inside: Computation) -> float | None:
    """Bytes that a fusion writes where it only updates a slice of its operand; None where it writes all."""
    root = next((one for one in inside.values() if one.root), None)
    while root and root.opcode == "bitcast":
        root = inside.get(root.operands[0])
    if root is None or root.opcode != "dynamic-update-slice":
        return None
    return float(sum(array.nbytes for array in inside[root.operands[1]].arrays))
