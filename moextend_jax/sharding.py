"""TABLE logical axis (a letter of the legend) -> mesh axes, and the shardings that follow from it.

Parameters carry their letters (`parameters.py`), so every parameter and every optimizer leaf gets its sharding
from here. No PartitionSpec is written anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moextend_jax.parameters import by_path

MESH_AXES = ("data", "fsdp", "expert", "tensor")

TABLE: dict[str, tuple[str, ...] | None] = {
    # parameters; f is sharded further than F: new experts are computed in slices of f by the whole expert group
    "Z": None, "z": None, "Y": None, "U": None,
    "D": ("fsdp",), "d": None, "C": ("fsdp",), "W": None, "Q": None, "P": None, "A": None, "O": None, "H": None,
    "E": ("expert",), "X": None, "F": ("tensor",), "s": ("tensor",), "j": ("tensor",), "f": ("expert", "tensor"),
    "J": ("tensor",), "N": ("tensor",), "K": ("tensor",), "V": ("tensor",),
    # groups of D and of F that share a scale: split as D and F are
    "a": ("fsdp",), "v": ("tensor",),
    # activations; L is the residual stream's sequence, S one that is whole on a device, n images of all rows
    "B": ("data", "fsdp", "expert"), "n": ("data", "fsdp", "expert", "tensor"), "L": ("tensor",), "S": None, "M": None,
    "h": None, "w": None, "c": None, "G": None, "g": None,
    # of low-rank updates; r is also what registers of a vision tower are
    "I": None, "r": None,
    # of media: mel bands and frames, queries of a resampler (u of its blocks attend to features), places of all media
    "b": None, "l": None, "q": None, "u": None, "i": None,
}  # fmt: skip


GPUS = ("gpu", "cuda", "rocm")
"""Names of the platform "gpu" in JAX and in the topologies of its plugins."""


def platform() -> str:
    """ "cpu", "tpu" or "gpu": what the program is compiled for; ahead of time the compiling host may have another."""
    device = _abstract_device()
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in GPUS else name


def device_kind() -> str:
    """What JAX calls the device that the program is compiled for."""
    device = _abstract_device()
    return device.device_kind if device else jax.local_devices()[0].device_kind


def _abstract_device() -> Any:
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def spec(axes: str, shape: tuple[int, ...] | None = None, mesh: Any = None) -> PartitionSpec:
    """The PartitionSpec of an array with these axes, e.g. "ZEDF". A letter without a rule is an error.

    With the array's shape and a mesh, an axis is split over as many of its mesh axes, from the first on, as divide
    it: 2 key heads on a tensor axis of 4 stay whole on every device.
    """
    entries = [entry or None for entry in _split(axes, shape, mesh)]
    # Results of programs have no trailing None; with another sharding, programs would be compiled again.
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


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


def items_to_add(rows: int, items: int) -> int:
    """How many empty items each of `rows` rows should have beside its own, on the mesh of `jax.set_mesh`, so that a
    tower's work is split over all of it. For instance 16 rows of 6 pictures are 12 for each 8th of 8 x 8 devices, all
    of which every device of that 8th would compute; with 8 pictures a row each device computes 2."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or mesh.manual_axes or mesh.empty:
        return 0
    devices = math.prod(mesh.shape[axis] for axis in TABLE["n"] or ())
    even = devices // math.gcd(rows, devices)  # multiples of it, times rows, are multiples of all devices
    whole = -(-items // even) * even

    def on_each(count: int) -> int:
        split = _dividing(TABLE["n"] or (), rows * count, mesh)
        return rows * count // math.prod(mesh.shape[axis] for axis in split)

    return whole - items if on_each(whole) < on_each(items) else 0


def parameter_shardings(model: nnx.Module, mesh: Mesh) -> dict[str, NamedSharding]:
    """Sharding of every parameter of a real or abstract model, by path."""
    params = by_path(nnx.state(model, nnx.Param))
    return {path: NamedSharding(mesh, spec(param.axes, param.shape, mesh)) for path, param in params.items()}


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
    """How an argument of `map_shards` is split: its axes' letters, and the mesh axes that split each of them."""

    axes: str
    split: tuple[tuple[str, ...], ...]

    def without_first(self) -> Shards:
        """The split of one layer of a stack."""
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
    """A module's arrays by path, and how each is split. In a module that is one layer of a stack, arrays lack the axis
    of their first letter."""
    params = by_path(nnx.state(module, nnx.Param))
    arrays = {path: param[...] for path, param in params.items()}
    return arrays, {path: shards(params[path].axes[-array.ndim :], array.shape) for path, array in arrays.items()}


def map_shards(function: Callable[..., Any], ins: tuple[Any, ...], out: Any) -> Callable[..., Any]:
    """`function` on every device's own part of its arguments, `jax.shard_map` with specs from the table.

    Args:
      ins: for each argument a pytree of `Shards`, or a prefix of one; what has no split is the same on every device.
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
    """Inside `map_shards`: all-gathers the array over all mesh axes but `keep`. Its gradient is summed over the devices
    and split as the array was (a reduce-scatter)."""
    for index, axes in enumerate(how.split):
        wanted = tuple(axis for axis in axes if axis not in keep)
        if wanted:
            array = jax.lax.all_gather(array, wanted, axis=index, tiled=True)
    return array
