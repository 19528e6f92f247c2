"""TABLE logical axis (a letter of the legend) -> mesh axes, and the shardings that follow from it.

Parameters carry their letters (`models/parameters.py`), so every parameter and every optimizer leaf gets its sharding
from here. No PartitionSpec is written anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moextend_jax.config import Batch, MoextendError
from moextend_jax.models.parameters import by_path

MESH_AXES = ("data", "fsdp", "expert", "tensor")

TABLE: dict[str, tuple[str, ...] | None] = {
    # parameters
    "Z": None, "Y": None, "U": None,
    "D": ("fsdp",), "d": None, "C": None, "W": None, "Q": None, "P": None, "A": None, "O": None, "H": None,
    "E": ("expert",), "X": None, "F": ("tensor",), "J": ("tensor",),
    "N": ("tensor",), "K": ("tensor",), "V": ("tensor",),
    # activations
    "B": ("data", "fsdp", "expert"), "L": None, "M": None, "h": None, "w": None, "c": None,
}  # fmt: skip


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; one size may be -1, which takes what is left."""
    if set(sizes) != set(MESH_AXES):
        raise MoextendError(f"mesh axes are {', '.join(MESH_AXES)}; got {', '.join(sizes)}")
    devices = len(jax.devices())
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    shape = tuple(devices // known if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES)
    if list(sizes.values()).count(-1) > 1 or int(np.prod(shape)) != devices:
        raise MoextendError(f"a mesh of {dict(sizes)} does not cover {devices} devices")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def spec(axes: str) -> PartitionSpec:
    """The PartitionSpec of an array with these axes, e.g. "ZEDF". A letter without a rule is an error."""
    entries: list[Any] = []
    used: set[str] = set()
    for letter in axes:
        mesh_axes = TABLE[letter] or ()
        if used & set(mesh_axes):
            raise ValueError(f"axes {axes!r} use mesh axis {sorted(used & set(mesh_axes))} twice")
        used |= set(mesh_axes)
        entries.append(mesh_axes or None)
    return PartitionSpec(*entries)


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a real or abstract model, by path."""
    params = by_path(nnx.state(model, nnx.Param))
    return {path: NamedSharding(mesh, spec(param.axes)) for path, param in params.items()}


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A host batch on the devices, rows split as the table splits B."""

    def put(name: str, array: Any) -> Any:
        axes = name.split("_")[1].replace("hwc", "") if array is not None else ""
        return None if array is None else jax.device_put(array, NamedSharding(mesh, spec(axes)))

    return Batch(**{name: put(name, array) for name, array in batch._asdict().items()})
