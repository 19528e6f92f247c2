"""Bytes that chips send each other: a compiled program in, what each kind of collective moves over each mesh axis out.

Bytes are what one chip receives per step: of an all-gather over n chips, (n - 1)/n of its result.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.plan.hlo import Instruction, Module, runs
from moextend_jax.plan.products import phase

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


class Collective(NamedTuple):
    """`axes` are the mesh axes over which it goes; bytes are of one execution, `times` executions per step."""

    kind: str
    axes: tuple[str, ...]
    group: int
    nbytes: float
    times: float
    phase: str


def collectives(module: Module, mesh: Any, *, unknown: Callable[[Instruction], float]) -> list[Collective]:
    """All of them; an asynchronous one counts once, at its start."""
    found = []
    for one, computation, times, where, op_name in runs(module, unknown=unknown):
        kind = one.opcode.removesuffix("-start")
        if where.startswith("all-reduce-scatter"):  # how TPUs write a reduce-scatter: fused with the slice it ends in
            kind = kind.replace("all-reduce", "reduce-scatter")
        if kind not in KINDS or one.overlapped == "on":
            continue
        group, groups = _groups(one, int(np.prod(list(mesh.shape.values()))))
        if group < 2:
            continue
        operands = one.operands[:1] if kind.startswith("ragged") else one.operands  # the others are offsets and sizes
        given = [array for name in operands for array in computation[name].arrays]
        nbytes = _received(kind, sum(array.nbytes for array in given), group)
        found.append(Collective(kind, axes_of(groups, mesh), group, nbytes, times, phase(op_name)))
    return found


def by_axis(found: list[Collective]) -> dict[str, dict[str, float]]:
    """kind -> axes joined by "+" -> bytes received per chip and step."""
    table: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in found:
        table[one.kind]["+".join(one.axes)] += one.nbytes * one.times
    return {kind: dict(row) for kind, row in table.items()}


def _received(kind: str, given: float, group: int) -> float:
    """`given` are the bytes of a chip's operands."""
    others = group - 1
    if kind == "all-gather":
        return given * others
    if kind == "all-reduce":  # a reduce-scatter and an all-gather
        return 2 * given * others / group
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    return given * others / group


def axes_of(groups: np.ndarray, mesh: Any) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    shape = tuple(mesh.shape.values())
    places = np.stack(np.unravel_index(groups, shape), axis=-1)  # [group, member, axis]
    differ = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, differs in zip(mesh.shape, differ, strict=True) if differs)


def _groups(one: Instruction, devices: int) -> tuple[int, np.ndarray]:
    """(members of a group, groups [G, n] of positions in the mesh)."""
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest):
        found = np.array([tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
        moving = found[found[:, 0] != found[:, 1]] if len(found) else found
        return (2, moving) if len(moving) else (1, np.zeros((1, 1), int))
    groups = parse_groups(one.rest, devices)
    return groups.shape[1], groups


def parse_groups(text: str, devices: int) -> np.ndarray:
    """Replica groups [G, n] in any of XLA's ways to write them:

    {{0,1},{2,3}}; [2,2]<=[2,2]T(1,0), an array of all numbers transposed; mesh['a'=2,'b'=2] {'b'}, by mesh axes,
    also parts of one: {'a':(1)2}, or with the order of its devices; {}, all devices.
    """
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:,\s*device_ids=(\(.*?\))\s*)?\{('[^}]*)\}", text):
        return _by_mesh(match[1], match[2], match[3])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _transposed(match[2], match[3]).reshape(_numbers(match[1]))
    match = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", text)
    listed = re.findall(r"\{([\d,]+)\}", match[1]) if match else []
    return np.array([_numbers(group) for group in listed] or [list(range(devices))])


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _transposed(dims: str, order: str | None) -> np.ndarray:
    """All numbers in an array of these sizes, its axes in another order."""
    sizes = _numbers(dims)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _by_mesh(axes: str, device_ids: str | None, grouped: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    chosen = {name: (before, size) for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)}
    dims: list[int] = []
    inside: list[int] = []
    for name, size in sizes.items():
        before, part = chosen.get(name, ("", ""))
        pieces = [int(before), int(part), size // int(before) // int(part)] if part else [size]
        if name in chosen:
            inside.append(len(dims) + (1 if part else 0))
        dims += pieces
    outside = [axis for axis in range(len(dims)) if axis not in inside]
    devices = np.arange(math.prod(dims))
    if device_ids is not None:  # ([2,4]T(1,0)), transposed, or (0,2,1,3), listed
        match = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
        devices = _transposed(match[1], match[2]) if match else np.array(_numbers(device_ids))
    return devices.reshape(dims).transpose([*outside, *inside]).reshape(-1, math.prod(dims[axis] for axis in inside))
