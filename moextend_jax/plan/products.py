"""Matrix products that a compiled program does: its text in, FLOPs of every product per step and chip out.

A multiplication and an addition are two FLOPs. Kernels (Mosaic, Triton) count by the estimate that they carry; grouped
products know only their buffer's rows, so the caller says which share of those belongs to their groups.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moextend_jax.plan.hlo import Array, Computation, Instruction, Module, runs

Share = Callable[["Kernel", float], float]
"""(kernel, times it runs per step) -> share of its rows that are real."""


class Kernel(NamedTuple):
    """A grouped product: `groups` weight matrices [D, F] (either way round), `rows` in its buffer."""

    groups: int
    matrix: tuple[int, int]
    rows: int


class Products(NamedTuple):
    """FLOPs per step by phase: forward, recomputed, backward. `uncounted`: kernels of which nobody knows the FLOPs."""

    by_phase: dict[str, float]
    uncounted: list[str]

    @property
    def flops(self) -> float:
        return sum(self.by_phase.values())


def products(module: Module, *, unknown: Callable[[Instruction], float], share: Share | None = None) -> Products:
    phases, uncounted = {"forward": 0.0, "recomputed": 0.0, "backward": 0.0}, []
    for one, computation, times, _, op_name in runs(module, unknown=unknown):
        if one.opcode == "dot":
            flops = _dot(one, computation)
        elif one.opcode == "convolution":
            flops = _convolution(one, computation)
        elif one.opcode == "custom-call" and _is_product(one):
            flops = _kernel(one, computation, times, share)
            if flops is None:
                uncounted.append(f"{one.name} ({one.op_name})")
                continue
        else:
            continue
        phases[phase(op_name)] += flops * times
    return Products(phases, uncounted)


def phase(op_name: str) -> str:
    if "rematted_computation" in op_name:
        return "recomputed"
    return "backward" if "transpose(" in op_name else "forward"


def _dims(name: str, computation: Computation) -> tuple[int, ...]:
    return computation[name].arrays[0].dims


def _numbers(attribute: str, text: str) -> list[int]:
    match = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", text)
    return [int(n) for n in match[1].split(",") if n] if match else []


def _dot(one: Instruction, computation: Computation) -> float:
    left = _dims(one.operands[0], computation)
    return 2.0 * one.arrays[0].size * math.prod(left[n] for n in _numbers("lhs_contracting_dims", one.rest))


def _convolution(one: Instruction, computation: Computation) -> float:
    """TPUs write products as convolutions, batch axes as windows whose padding and holes cost nothing."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None
    left, right = _dims(one.operands[0], computation), _dims(one.operands[1], computation)
    out = one.arrays[0].dims
    groups = re.search(r"batch_group_count=(\d+)", one.rest)
    flops = 2.0 * right[labels[2].index("i")] * out[labels[3].index("f")] * left[labels[1].index("b")]
    flops /= int(groups[1]) if groups else 1
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    rank = len(fields.get("size", "").split("x")) if fields else 0
    for axis in range(rank):

        def field(name: str, default: str, axis=axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        label = str(axis)
        low = int(field("pad", "0_0").split("_")[0])
        size, stride = int(field("size", "1")), int(field("stride", "1"))
        hole, spread = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
        inputs, outputs = left[labels[1].index(label)], out[labels[3].index(label)]
        at = np.arange(outputs)[:, None] * stride + np.arange(size)[None] * spread - low
        flops *= int(((at >= 0) & (at < (inputs - 1) * hole + 1) & (at % hole == 0)).sum())
    return flops


def _is_product(one: Instruction) -> bool:
    """Kernels, but not the compiler's own calls for addresses, sorting and the like."""
    target = re.search(r'custom_call_target="([^"]*)"', one.rest)
    return bool(target) and (
        target[1] in ("tpu_custom_call", "__gpu$xla.gpu.triton", "mosaic_gpu_v2", "triton_kernel_call")
        or target[1].startswith(("__cublas", "__cudnn"))
    ) and "metadata" not in one.name  # fmt: skip


ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4, "forward": 2, "query": 3, "key": 4}
"""TABLE kernel of splash attention or of ours for GPUs -> number of products over all pairs of positions; gradient
kernels compute the scores again."""


def _attention(one: Instruction, computation: Computation) -> float | None:
    """FLOPs of the causal half. Its largest arrays are query, output and their gradients: [..., heads, S, H] on TPUs,
    [B, S, heads, H] on GPUs."""
    match = re.search(r"(splash_\w+?|triton_attention)_(fwd|dq|dkv|forward|query|key)", f"{one.name} {one.op_name}")
    if not match:
        return None
    query = max((array for name in one.operands for array in computation[name].arrays), key=lambda array: array.size)
    return ATTENTION[match[2]] * 2.0 * query.size * query.dims[-3 if match[1] == "triton_attention" else -2] / 2


def _kernel(one: Instruction, computation: Computation, times: float, share: Share | None) -> float | None:
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.rest)
    grouped = _grouped(one, computation)
    if grouped is None and "gemm_backend_config" in one.rest:
        axes = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', one.rest)
        left = _dims(one.operands[0], computation)
        return 2.0 * one.arrays[0].size * math.prod(left[int(n)] for n in re.findall(r"\d+", axes[1])) if axes else None
    if grouped is None:
        known = _attention(one, computation)
        return known if known or not estimate else float(estimate[1])
    D, F = grouped.matrix
    flops = float(estimate[1]) if estimate and int(estimate[1]) else 2.0 * grouped.rows * D * F
    return flops * (share(grouped, times) if share else 1.0)


def _grouped(one: Instruction, computation: Computation) -> Kernel | None:
    """gmm: [R, D] x [G, D, F] -> [R, F]; its gradient to the weights: [R, D] x [R, F] -> [G, D, F]."""
    if not re.search(r"gmm|triton_grouped|ragged[-_]dot", f"{one.name} {one.op_name}"):
        return None
    result = one.arrays[0]
    given = [computation[name].arrays[0] for name in one.operands if computation[name].arrays]
    matrices = [array for array in (result, *given) if len(array.dims) == 3 and _is_float(array)]
    rows = [array for array in (result, *given) if len(array.dims) == 2 and _is_float(array)]
    if not matrices or not rows:
        return None
    groups, D, F = matrices[0].dims
    groups //= one.layers
    # The rows are the axis of a two-dimensional array that is not an axis of the matrix.
    counts = [array.dims[0] if array.dims[1] in (D, F) else array.dims[1] for array in rows]
    return Kernel(groups, (D, F), max(counts))


def _is_float(array: Array) -> bool:
    return array.kind.startswith(("f", "bf"))
