"""Meshes: sizes that fill, devices of several slices, how arrays are split where sizes do not divide."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moextend_jax import mesh as meshes
from moextend_jax import sharding
from moextend_jax.config import MoextendError


@dataclasses.dataclass(frozen=True)
class Device:
    """What arranging looks at in a device."""

    id: int
    slice_index: int
    platform: str = "cpu"
    device_kind: str = "none"

    @property
    def process_index(self) -> int:
        return self.id // 2


class Sizes:
    """Stands for a mesh where only the sizes of its axes count."""

    shape = {"data": 2, "fsdp": 4, "expert": 2, "tensor": 4}


DEVICES = [Device(id, slice_index=id // 8) for id in range(16)]


def test_only_replicas_span_slices():
    array = meshes.arranged(DEVICES, (2, 4, 2, 1))
    assert sorted(device.id for device in array.flat) == list(range(16))
    for replica in array:
        assert len({device.slice_index for device in replica.flat}) == 1


def test_replicas_inside_a_slice_too():
    array = meshes.arranged(DEVICES, (4, 2, 1, 2))
    assert [{device.slice_index for device in replica.flat} for replica in array] == [{0}, {0}, {1}, {1}]


def test_a_mesh_that_would_cut_a_slice_is_refused():
    with pytest.raises(MoextendError, match=r"mesh.data = 1 must be a multiple of 2 slices"):
        meshes.arranged(DEVICES, (1, 16, 1, 1))


def test_one_slice_keeps_the_order_of_nodes():
    array = meshes.arranged(DEVICES[:8], (2, 4, 1, 1))
    assert [device.id for device in array.flat] == list(range(8))


def test_nodes_of_gpus_are_no_slices():
    """Their devices are numbered by slice too, but any axis may span nodes."""
    gpus = [dataclasses.replace(device, platform="gpu") for device in DEVICES]
    array = meshes.arranged(gpus, (1, 16, 1, 1))
    assert [device.id for device in array.flat] == list(range(16))


def test_minus_one_takes_what_is_left():
    mesh = meshes.make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    assert mesh.shape["fsdp"] == jax.device_count()


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        ("ZDKH", (3, 8, 8, 6), PartitionSpec(None, "fsdp", "tensor", None)),
        ("ZDKH", (3, 8, 2, 6), PartitionSpec(None, "fsdp", None, None)),  # 2 key heads, tensor 4
        ("YXDf", (2, 1, 8, 16), PartitionSpec(None, None, "fsdp", ("expert", "tensor"))),
        ("YXDf", (2, 1, 8, 6), PartitionSpec(None, None, "fsdp", "expert")),  # 6 over 2, but not over 8
        ("BL", (16, 6), PartitionSpec(("data", "fsdp", "expert"), None)),
    ],
)
def test_an_axis_is_split_as_far_as_its_size_divides(axes: str, shape: tuple[int, ...], expected: PartitionSpec):
    assert sharding.spec(axes, shape, Sizes) == expected


def test_rows_are_dealt_out_so_that_devices_keep_their_own():
    rows = jnp.arange(8)[:, None]
    parts = np.asarray(sharding.split_rows(rows, 2))[..., 0]
    np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])
    # On 4 devices of 2 rows each, device d holds rows 2d and 2d+1: one in every part, at place d.
    assert all(set(parts[:, d]) == {2 * d, 2 * d + 1} for d in range(4))
