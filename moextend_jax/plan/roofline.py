"""The least time that a step can take: FLOPs, bytes of memory and bytes sent in; seconds and what bounds them out.

The longest of computing, moving memory and sending is the bound, as if the others were hidden behind it. Real steps
take longer: this is the hardware's limit for the compiled program, not a prediction of its schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from moextend_jax.chips import Chip
from moextend_jax.plan.collectives import Collective


class Roofline(NamedTuple):
    """Seconds per step; `network` is the sum over `by_axis` (mesh axes joined by "+"); `host`: fetching from the host,
    and putting back at the same time."""

    compute: float
    memory: float
    network: float
    by_axis: dict[str, float]
    host: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network, self.host)

    @property
    def bound(self) -> str:
        return max(BOUNDS, key=lambda name: getattr(self, name))


BOUNDS = ("compute", "memory", "network", "host")


def roofline(
    chip: Chip, mesh: Any, *, flops: float, traffic: float, sent: Iterable[Collective], host: float = 0.0
) -> Roofline:
    """`flops`, `traffic` and `host` (bytes that its host keeps and each step fetches) are of one chip."""
    by_axis: dict[str, float] = {}
    for one in sent:
        name = "+".join(one.axes)
        bandwidth = axis_bandwidth(chip, mesh, one.axes)
        # A permute uses one link in one direction. In an all-to-all, a torus moves a quarter of what a gather moves.
        share = {"collective-permute": 2.0, "all-to-all": one.group / 4, "ragged-all-to-all": one.group / 4}
        factor = max(1.0, share.get(one.kind, 1.0)) if chip.platform == "tpu" else 1.0
        by_axis[name] = by_axis.get(name, 0.0) + factor * one.nbytes * one.times / bandwidth
    fetched = host / chip.host if chip.host else 0.0
    return Roofline(flops / chip.flops, traffic / chip.hbm_bandwidth, sum(by_axis.values()), by_axis, fetched)


def axis_bandwidth(chip: Chip, mesh: Any, axes: tuple[str, ...]) -> float:
    """Bytes per second that one chip receives in a ring over these mesh axes."""
    names = list(mesh.axis_names)
    moved = [names.index(axis) for axis in axes]
    group = np.moveaxis(mesh.devices, moved, range(len(moved))).reshape(
        int(np.prod([mesh.devices.shape[axis] for axis in moved])), -1
    )[:, 0]
    if chip.platform == "gpu":
        one_node = len({device.process_index for device in group}) == 1
        return chip.link if one_node else chip.network
    coords = np.array([device.coords for device in group])
    spans = [len(set(coords[:, axis])) for axis in range(coords.shape[1])]
    everywhere = np.array([device.coords for device in mesh.devices.flat])
    sides = [len(set(everywhere[:, axis])) for axis in range(everywhere.shape[1])]
    # A closed ring sends both ways. An open one (also a part of a side) has ends, and only one way there.
    closed = all(side % chip.wraps == 0 for side in sides if side > 1)
    ways = [2 if closed and span == side else 1 for span, side in zip(spans, sides, strict=True) if span > 1]
    return chip.link * max(1, sum(ways))
