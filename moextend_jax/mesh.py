"""The one door onto the mesh: devices become a mesh, arrays are placed on it, and programs run on it and nowhere else.

In: sizes of the mesh axes; rows and leaves on the host; functions of a model. Out: a `Mesh`; global arrays; `Program`s,
which enter `jax.set_mesh` themselves (kernels look there for how their arguments are split, and Pallas kernels cannot
be lowered for several devices without it).

A mesh cuts a batch's rows into `row_shards` equal parts. Which of them lie on a process's devices is a list, never a
range: on the tori of v5p, v5e and v6e, 16 hosts of 4 chips hold for instance the parts (0, 4, 16, 20), (1, 5, 17, 21),
... of 64. `own_row_shards` says which; everything that reads rows reads those, in that order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from moextend_jax.config import MoextendError
from moextend_jax.sharding import GPUS, MESH_AXES, TABLE, parameter_shardings, spec

# --- meshes -----------------------------------------------------------------------------------------------------------


def make_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh over all devices; one size may be -1, which takes what is left."""
    return mesh_of(jax.devices(), sizes)


def one_device() -> Mesh:
    """A mesh of this process's first device alone, for models that are whole on it."""
    return mesh_of(jax.local_devices()[:1], dict.fromkeys(MESH_AXES, 1))


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
        raise MoextendError(
            f"a mesh of {dict(sizes)} does not cover {devices} devices: the product of its sizes must be {devices}, "
            "and one of them may be -1, which takes all that are left (--config.mesh.fsdp=-1)"
        )
    return shape


def arranged(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Devices in the mesh's shape, so that neighbours in it are near each other. Links within a TPU slice are fast;
    between slices only replicas ("data") communicate. GPUs come node by node, so the first axes span nodes."""
    if devices[0].platform in GPUS:
        return np.array(devices).reshape(shape)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        # The torus of v5e and v6e has two dimensions, fewer than a mesh may need, so these may be split.
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (ValueError, NotImplementedError) as error:
            sizes = ", ".join(f"mesh.{axis} = {size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1)
            raise MoextendError(
                f"JAX cannot lay a mesh of {sizes} over these {len(devices)} chips ({error}); change its sizes, as "
                "--config.mesh.tensor=4, or take another shape of chips"
            ) from None
    if shape[0] % slices:
        raise MoextendError(f"mesh.data = {shape[0]} must be a multiple of {slices} slices: only replicas span them")
    within = (shape[0] // slices, *shape[1:])
    between = (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


# --- programs ---------------------------------------------------------------------------------------------------------


class Program:
    """`jax.jit` of a function of a model, for one mesh; `options` are jit's."""

    def __init__(self, function: Callable[..., Any], *, mesh: Mesh, **options: Any):
        self.mesh, self._jitted = mesh, jax.jit(function, **options)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        with jax.set_mesh(self.mesh):
            return self._jitted(*arguments, **named)

    def lower(self, *arguments: Any, **named: Any) -> jax.stages.Lowered:
        """Lowered for arguments, which may be `jax.ShapeDtypeStruct`s on devices that are not here."""
        with jax.set_mesh(self.mesh):
            return self._jitted.lower(*arguments, **named)


# --- rows -------------------------------------------------------------------------------------------------------------


def row_shards(mesh: Mesh) -> int:
    """Equal parts that a mesh cuts a batch's rows into."""
    return math.prod(mesh.shape[axis] for axis in TABLE["B"] or ())


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first axis is a batch's rows."""
    return NamedSharding(mesh, spec("B"))


def own_row_shards(mesh: Mesh, *, process: int | None = None) -> tuple[int, ...]:
    """The parts of a batch's rows that lie on devices of a process (None: this one), ascending.

    Processes whose devices hold the same parts (the tensor axis crosses them) read the same rows.
    """
    process = jax.process_index() if process is None else process
    places = rows_sharding(mesh).devices_indices_map((row_shards(mesh),))
    return tuple(sorted({rows.start or 0 for device, (rows,) in places.items() if device.process_index == process}))


def own_rows(tree: Any, mesh: Mesh) -> Any:
    """This process's rows of host arrays that every process has whole, as `place_rows` takes them."""
    parts, shards = own_row_shards(mesh), row_shards(mesh)

    def of(array: np.ndarray) -> np.ndarray:
        _check_divides(len(array), shards, what="rows")
        return array.reshape(shards, -1, *array.shape[1:])[list(parts)].reshape(-1, *array.shape[1:])

    return jax.tree.map(of, tree)


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Global arrays from a tree of host arrays with this process's rows, in the order of its `own_row_shards`."""
    sharding, parts, shards = rows_sharding(mesh), own_row_shards(mesh), row_shards(mesh)

    def placed(array: Any) -> jax.Array:
        array = np.asarray(array)
        _check_divides(len(array), len(parts), what="rows of this process")
        rows = len(array) // len(parts)

        def shard(index: Any) -> np.ndarray:
            place = parts.index((index[0].start or 0) // max(rows, 1)) * rows
            return array[place : place + rows]

        return jax.make_array_from_callback((rows * shards, *array.shape[1:]), sharding, shard)

    return jax.tree.map(placed, tree)


def place_whole(tree: Any, mesh: Mesh) -> Any:
    """As `place_rows`, from host arrays that every process has whole."""
    return place_rows(own_rows(tree, mesh), mesh)


class Rows(NamedTuple):
    """A setting that says how many rows are computed together, and in how many parts one after another."""

    setting: str
    rows: int
    parts: int = 1


def check_rows(settings: Sequence[Rows], mesh: Mesh) -> None:
    """Refuses rows that a mesh cannot cut into equal parts: every device would silently compute all of them.

    Raises:
      MoextendError: names every such setting, with sizes that would do.
    """
    shards, wrong = row_shards(mesh), []
    for setting, rows, parts in settings:
        if rows % (shards * parts):
            wanted, above = shards * parts, -(-rows // (shards * parts)) * shards * parts
            sizes = " or ".join(str(size) for size in (above - wanted, above) if size > 0)
            if fewer := [part for part in range(1, parts) if rows % (shards * part) == 0]:  # the same batch
                sizes = f"{setting.replace('batch_size', 'accumulate')} = {fewer[-1]}, or {sizes} rows"
            wrong.append(f"{setting} = {rows}" + (f" in {parts} parts" if parts > 1 else "") + f" ({sizes} would do)")
    if wrong:
        sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        raise MoextendError(
            f"the mesh ({sizes}) cuts rows into {shards} equal parts, which does not work for {'; '.join(wrong)}. "
            f"Change these, or mesh.data, mesh.fsdp and mesh.expert, whose product is that number"
        )


def _check_divides(rows: int, parts: int, *, what: str) -> None:
    if rows % parts:
        raise ValueError(f"{rows} {what} cannot be cut into {parts} equal parts; check_rows comes first")


# --- leaves -----------------------------------------------------------------------------------------------------------


def place(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on the devices of `sharding`: one that is on devices already, or that every process has on its host."""
    if sharding.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
        return jax.device_put(array, sharding)
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, lambda index: on_host[index])


def place_leaves(model: nnx.Module, arrays: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Leaves of a model by path, each sharded as the table says; `model` gives the structure alone."""
    shardings = parameter_shardings(model, mesh)
    return {path: place(leaf, shardings[path]) for path, leaf in arrays.items()}


def leaf_maker(model: nnx.Module, make: Callable[..., Mapping[str, Any]], *arguments: Any, mesh: Mesh) -> Program:
    """`make` as a program that gives leaves of a model by path. Each is made on its own devices, so no process makes
    another's part.

    `model` gives the structure alone. `make` is traced, and may give any of its leaves. The program is called with
    arrays like `arguments`.
    """
    shardings = parameter_shardings(model, mesh)
    out_shardings = {path: shardings[path] for path in jax.eval_shape(make, *arguments)}
    return Program(make, mesh=mesh, out_shardings=out_shardings)


def make_leaves(
    model: nnx.Module, make: Callable[..., Mapping[str, Any]], *arguments: Any, mesh: Mesh
) -> dict[str, jax.Array]:
    """The leaves from one call of a `leaf_maker`."""
    return leaf_maker(model, make, *arguments, mesh=mesh)(*arguments)


def optimizer_shardings(state: Any, leaves: Mapping[str, Any], mesh: Mesh, *, moments: str) -> Any:
    """Shardings of an optimizer's state, real or abstract: a leaf that stands under a parameter's path and has its
    shape (a moment) is sharded as the parameter, any other (a count of steps) is the same on every device.

    Args:
      moments: "device", or "host": in its pinned memory.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        owners = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in leaves]
        owner = leaves[owners[-1]] if owners and leaves[owners[-1]].shape == leaf.shape else None
        if owner is None:
            return NamedSharding(mesh, spec(""))
        return owner.sharding if moments == "device" else owner.sharding.with_memory_kind("pinned_host")

    return jax.tree_util.tree_map_with_path(of, state)


def on_host(array: Any) -> np.ndarray:
    """A whole array on the host; what other processes hold of it is fetched. For small ones."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
