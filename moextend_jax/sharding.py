"""TABLE logical axis (a letter of the legend) -> mesh axes, and the shardings that follow from it.

Parameters carry their letters (`models/parameters.py`), so every parameter and every optimizer leaf gets its sharding
from here. No PartitionSpec is written anywhere else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
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


def split_cpu(devices: int) -> None:
    """Makes that many XLA devices of a CPU. A process that has used JAX before keeps the devices it has."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


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
    """A host batch on the devices, rows split as the table splits B; rows that do not divide go to every device."""
    shards = int(np.prod([mesh.shape[axis] for axis in TABLE["B"] or ()]))

    def put(name: str, array: Any) -> Any:
        if array is None:
            return None
        axes = name.split("_")[1].replace("hwc", "") if array.shape[0] % shards == 0 else ""
        return jax.device_put(array, NamedSharding(mesh, spec(axes)))

    return Batch(**{name: put(name, array) for name, array in batch._asdict().items()})


def map_rows(function: Callable[[Any, Any], Any], split: Any, *, whole: Any = ()) -> Any:
    """`function(split, whole)` on every device's own rows: the arrays of `split`, and what is returned, have B or T in
    front; those of `whole` go to every device.

    The mesh is the one of `jax.set_mesh`; without one, or where the rows do not divide over it (a single prompt), the
    function sees them all. The gradient of `whole` is summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in TABLE["B"] or () if mesh.shape.get(axis, 1) > 1)
    if not axes or jax.tree.leaves(split)[0].shape[0] % int(np.prod([mesh.shape[axis] for axis in axes])):
        return function(split, whole)

    def local(split, whole):
        return function(split, jax.tree.map(lambda array: jax.lax.pcast(array, axes, to="varying"), whole))

    rows = PartitionSpec(axes)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows, axis_names=set(axes))
    return sharded(split, whole)


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Zeros with the dtype of `like`, which inside `map_rows` differ by device as `like` does: a loop's start."""
    array, axes = jnp.zeros(shape, like.dtype), tuple(jax.typeof(like).manual_axis_type.varying)
    return jax.lax.pcast(array, axes, to="varying") if axes else array
