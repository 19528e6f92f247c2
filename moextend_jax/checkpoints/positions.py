"""Positions of a picture tower on another grid than its file's, computed once, as it is opened; nothing is read yet."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.config import VisionConfig
from moextend_jax.families.towers import TOWERS


def resized(stored: Mapping[str, Stored], before: VisionConfig, after: VisionConfig) -> dict[str, Stored]:
    """The tensors of a tower with its positions on the grid of `after`, the class token's as it is; in their element
    type, computed in float32 as transformers does for every picture."""
    tower = TOWERS[before.family]
    name = next(row.file for row in tower.names if row.path.endswith("/position"))
    positions, first = stored[name], int(before.class_token)
    if after.grid == before.grid:
        return dict(stored)

    def read() -> np.ndarray:
        table_QC = positions.read().reshape(-1, before.width).astype(np.float32)
        grid_yxC = table_QC[first:].reshape(before.grid, before.grid, -1)
        side = bicubic(before.grid, after.grid, antialiased=tower.resized == "antialiased")
        resized_yxC = np.einsum("ay,bx,yxC->abC", side, side, grid_yxC, optimize=True)
        table_QC = np.concatenate([table_QC[:first], resized_yxC.reshape(-1, before.width)])
        return table_QC.astype(positions.dtype).reshape(shape)

    shape = (*positions.shape[:-2], first + after.patches, before.width)
    return {**stored, name: Stored(shape, positions.dtype, read, positions.where)}


def bicubic(size: int, new: int, *, antialiased: bool) -> np.ndarray:
    """Weights `[new, size]` of old points for new ones, as in PyTorch's `interpolate` (align_corners=False; edge values
    go on beyond the edge). antialiased: another kernel, scaled with the size of new pixels; points beyond an edge do
    not count."""
    a, scale = (-0.5, max(size / new, 1.0)) if antialiased else (-0.75, 1.0)
    centres = (np.arange(new) + 0.5) * size / new - 0.5
    reach = int(np.ceil(2 * scale)) + 1
    weights = np.zeros((new, size))
    for shift in range(-reach, reach + 1):
        points = np.floor(centres).astype(int) + shift
        kernel = _cubic(np.abs(points - centres) / scale, a)
        inside = (points >= 0) & (points < size) if antialiased else np.full(new, True)
        weights[np.arange(new)[inside], points[inside].clip(0, size - 1)] += kernel[inside]
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(far: np.ndarray, a: float) -> np.ndarray:
    """Keys's kernel at a distance."""
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    return np.where(far < 1, near, np.where(far < 2, ((far - 5) * far + 8) * a * far - 4 * a, 0.0))
