"""TABLE logical axis (a letter of the legend) -> mesh axes, and the shardings that follow from it.

Parameters carry their letters (`models/parameters.py`), so every parameter and every optimizer leaf gets its sharding
from here. No PartitionSpec is written anywhere else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moextend_jax.config import Batch, MoextendError
from moextend_jax.models.parameters import by_path

MESH_AXES = ("data", "fsdp", "expert", "tensor")

TABLE: dict[str, tuple[str, ...] | None] = {
    # parameters; f is sharded further than F: new experts are computed in slices of f by the whole expert group
    "Z": None, "Y": None, "U": None,
    "D": ("fsdp",), "d": None, "C": ("fsdp",), "W": None, "Q": None, "P": None, "A": None, "O": None, "H": None,
    "E": ("expert",), "X": None, "F": ("tensor",), "f": ("expert", "tensor"), "J": ("tensor",),
    "N": ("tensor",), "K": ("tensor",), "V": ("tensor",),
    # activations; L is the residual stream's sequence, S one that is whole on a device, n images of all rows
    "B": ("data", "fsdp", "expert"), "n": ("data", "fsdp", "expert", "tensor"), "L": ("tensor",), "S": None, "M": None,
    "h": None, "w": None, "c": None, "G": None, "g": None,
}  # fmt: skip


GPUS = ("gpu", "cuda", "rocm")
"""How JAX and the topologies of its plugins spell that platform."""


def split_cpu(devices: int) -> None:
    """Makes that many XLA devices of a CPU. A process that has used JAX before keeps the devices it has."""
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", devices)


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; one size may be -1, which takes what is left."""
    return mesh_of(jax.devices(), sizes)


def mesh_of(devices: Sequence[Any], sizes: Mapping[str, int]) -> Mesh:
    """The same over these devices, which may be ones to compile for only."""
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    return Mesh(arranged(devices, shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_shape(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Sizes of the mesh axes, in order, on that many devices."""
    if set(sizes) != set(MESH_AXES):
        raise MoextendError(f"mesh axes are {', '.join(MESH_AXES)}; got {', '.join(sizes)}")
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = {axis: devices // max(known, 1) if sizes[axis] == -1 else sizes[axis] for axis in MESH_AXES}
    if list(sizes.values()).count(-1) > 1 or math.prod(shape.values()) != devices:
        raise MoextendError(f"a mesh of {dict(sizes)} does not cover {devices} devices")
    return shape


def arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the mesh's shape, so that neighbours in it are near each other: a slice's links are fast, and between
    slices only replicas ("data") talk. GPUs come node by node, so the first axes span nodes."""
    if devices[0].platform in GPUS:
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # The torus of v5e and v6e has two dimensions, fewer than a mesh, unless one of them may be split.
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise MoextendError(f"mesh.data = {shape[0]} must be a multiple of {slices} slices: only replicas span them")
    within = (shape[0] // slices, *shape[1:])
    between = (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def platform() -> str:
    """ "cpu", "tpu" or "gpu": what the program is compiled for, which ahead of time is not what runs the compiler."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in GPUS else name


def spec(axes: str, shape: tuple[int, ...] | None = None, mesh: Any = None) -> PartitionSpec:
    """The PartitionSpec of an array with these axes, e.g. "ZEDF". A letter without a rule is an error.

    With the array's shape and a mesh, an axis is split over as many of its mesh axes, from the first on, as divide
    it: 2 key heads on a tensor axis of 4 stay whole on every device.
    """
    return PartitionSpec(*[entry or None for entry in _split(axes, shape, mesh)])


def _split(axes: str, shape: tuple[int, ...] | None, mesh: Any) -> tuple[tuple[str, ...], ...]:
    entries: list[tuple[str, ...]] = []
    used: set[str] = set()
    for index, letter in enumerate(axes):
        mesh_axes = TABLE[letter] or ()
        if used & set(mesh_axes):
            raise ValueError(f"axes {axes!r} use mesh axis {sorted(used & set(mesh_axes))} twice")
        used |= set(mesh_axes)
        entries.append(mesh_axes if shape is None else _dividing(mesh_axes, shape[index], mesh))
    return tuple(entries)


def _dividing(mesh_axes: tuple[str, ...], size: int, mesh: Any) -> tuple[str, ...]:
    kept: list[str] = []
    for axis in mesh_axes:
        if size % mesh.shape[axis]:
            break
        size //= mesh.shape[axis]
        if mesh.shape[axis] > 1:
            kept.append(axis)
    return tuple(kept)


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a real or abstract model, by path."""
    params = by_path(nnx.state(model, nnx.Param))
    return {path: NamedSharding(mesh, spec(param.axes, param.shape, mesh)) for path, param in params.items()}


def row_shards(mesh: Mesh) -> int:
    """Parts that a mesh makes of a batch's rows."""
    return math.prod(mesh.shape[axis] for axis in TABLE["B"] or ())


def batch_shardings(batch: Batch, mesh: Mesh) -> Batch:
    """Shardings of a batch's arrays, split by rows; None where the batch has none. Rows that do not divide go to
    every device."""
    rows = batch.ids_BL.shape[0]
    sharding = NamedSharding(mesh, spec("B") if rows % row_shards(mesh) == 0 else PartitionSpec())
    return Batch(*[None if array is None else sharding for array in batch])


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A host batch on the devices. With several processes each gives the rows of its own devices, which must divide
    (`distributed.share_of_rows`)."""
    if jax.process_count() > 1:
        rows = NamedSharding(mesh, spec("B"))
        return Batch(*[None if a is None else jax.make_array_from_process_local_data(rows, a) for a in batch])
    shardings = batch_shardings(batch, mesh)
    return Batch(*[None if a is None else jax.device_put(a, s) for a, s in zip(batch, shardings, strict=True)])


def constrain(array: jax.Array, axes: str) -> jax.Array:
    """Tells the compiler how an activation or a gradient is sharded on the mesh of `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.manual_axes or mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, spec(axes, array.shape, mesh))


def split_rows(array: jax.Array, parts: int) -> jax.Array:
    """`[B, ...] -> [parts, B/parts, ...]`, rows dealt out so that every device keeps its own."""
    rows = array.shape[0] // parts
    return jnp.moveaxis(array.reshape(rows, parts, *array.shape[1:]), 1, 0)


class Shards(NamedTuple):
    """An argument of `map_shards`: arrays of one letter string, and how each of their axes is split there."""

    axes: str
    split: tuple[tuple[str, ...], ...]

    def without_first(self) -> Shards:
        """Of one layer of a stack."""
        return Shards(self.axes[1:], self.split[1:])

    def over(self, letters: str) -> tuple[str, ...]:
        """Mesh axes over which these letters' axes are split."""
        pairs = zip(self.axes, self.split, strict=True)
        return tuple(axis for letter, axes in pairs if letter in letters for axis in axes)


def shards(axes: str, shape: tuple[int, ...]) -> Shards:
    """How an array with these axes is split on the current mesh, by the table."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Shards(axes, ((),) * len(axes))
    return Shards(axes, _split(axes, shape, mesh))


def module_shards(module: nnx.Module) -> tuple[dict[str, jax.Array], dict[str, Shards]]:
    """A module's arrays by path, and how each is split. Of a module that is one layer of a stack the arrays lack the
    first of their letters."""
    params = by_path(nnx.state(module, nnx.Param))
    arrays = {path: param[...] for path, param in params.items()}
    return arrays, {path: shards(params[path].axes[-array.ndim :], array.shape) for path, array in arrays.items()}


def map_shards(function: Callable[..., Any], ins: tuple[Any, ...], out: Any) -> Callable[..., Any]:
    """`function` on every device's own part of its arguments, `jax.shard_map` with specs from the table.

    Args:
      ins: for each argument a pytree of `Shards`, or a prefix of one; what is split in no way is the same everywhere.
      out: `Shards` of the results. The function itself gathers and sums over the mesh where it must (`gather`).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def to_spec(tree: Any) -> Any:
        is_leaf = lambda x: isinstance(x, Shards)  # noqa: E731
        return jax.tree.map(lambda s: PartitionSpec(*[entry or None for entry in s.split]), tree, is_leaf=is_leaf)

    # Pallas kernels do not say over which mesh axes their results differ, so JAX cannot check it.
    return jax.shard_map(function, mesh=mesh, in_specs=to_spec(ins), out_specs=to_spec(out), check_vma=False)


def gather(array: jax.Array, how: Shards, *, keep: tuple[str, ...] = ()) -> jax.Array:
    """Inside `map_shards`: the array whole along all mesh axes but `keep`. Its gradient comes back summed over the
    devices and split as the array was (a reduce-scatter)."""
    for index, axes in enumerate(how.split):
        wanted = tuple(axis for axis in axes if axis not in keep)
        if wanted:
            array = jax.lax.all_gather(array, wanted, axis=index, tiled=True)
    return array
