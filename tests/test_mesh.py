"""Meshes: sizes that fill, devices of several slices, how arrays are split where sizes do not divide."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs.demo import get_config as get_demo
from configs.mixtral_8x7b import get_config
from moextend_jax import cli, sharding
from moextend_jax import mesh as meshes
from moextend_jax.config import MoextendError
from moextend_jax.configurations import load
from moextend_jax.plan import topology
from moextend_jax.runs.making import counting_stage
from moextend_jax.runs.run import evaluation_rows, rows_of_settings
from moextend_jax.settings import from_config_dict


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


CONFIGS = Path(__file__).parents[1] / "configs"
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
        ("ZDKH", (3, 8, 8, 6), PartitionSpec(None, "fsdp", "tensor")),
        ("ZDKH", (3, 8, 2, 6), PartitionSpec(None, "fsdp")),  # 2 key heads, tensor 4
        ("YXDf", (2, 1, 8, 16), PartitionSpec(None, None, "fsdp", ("expert", "tensor"))),
        ("YXDf", (2, 1, 8, 6), PartitionSpec(None, None, "fsdp", "expert")),  # 6 over 2, but not over 8
        ("BL", (16, 6), PartitionSpec(("data", "fsdp", "expert"))),
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


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tensor", "first"),
    [("v5p:4x4x4", 1, (0, 4, 16, 20)), ("v5e:4x4", 1, (0, 1, 6, 15)), ("v5p:4x4x4", 8, (0,))],
)
def test_a_hosts_rows_are_where_its_chips_are(name: str, tensor: int, first: tuple[int, ...]):
    """On real tori, as libtpu describes them; and every part of the rows is some host's."""
    pytest.importorskip("libtpu", reason="topologies of TPUs need libtpu")
    sizes = {"data": 1, "fsdp": -1, "expert": 1, "tensor": tensor}
    mesh = topology.make_mesh(topology.parse(name), sizes)
    hosts = {device.process_index for device in mesh.devices.flat}
    parts = [meshes.own_row_shards(mesh, process=host) for host in sorted(hosts)]
    assert parts[0] == first
    assert sorted({part for own in parts for part in own}) == list(range(meshes.row_shards(mesh)))


def test_rows_that_every_process_has_are_placed_in_order():
    mesh = meshes.one_device()
    rows = {"a": np.arange(12).reshape(6, 2), "b": None}
    placed = meshes.place_whole(rows, mesh)
    np.testing.assert_array_equal(placed["a"], rows["a"])


def test_rows_that_do_not_divide_are_refused_with_sizes_that_would_do():
    """32 rows in two parts on 32 row shards: every chip would compute all of them, 32 times the work."""
    settings = from_config_dict(get_config("packed"))
    pod: Any = SimpleNamespace(shape={"data": 1, "fsdp": 8, "expert": 1, "tensor": 8})
    meshes.check_rows(rows_of_settings(settings), pod)
    pod.shape["fsdp"] = 32
    with pytest.raises(
        MoextendError, match=r"batch_size = 32 in 2 parts \(finetune.accumulate = 1, or 64 rows would do\)"
    ) as refused:
        meshes.check_rows(rows_of_settings(settings), pod)
    assert "32 equal parts" in str(refused.value) and "align" not in str(refused.value)
    meshes.check_rows(evaluation_rows(settings), pod)  # which `moextend evaluate` alone computes
    pod.shape["fsdp"] = 64  # fewer parts do not help
    with pytest.raises(MoextendError, match=r"finetune.batch_size = 32 in 2 parts \(128 would do\)"):
        meshes.check_rows(rows_of_settings(settings), pod)
    pod.shape["fsdp"] = 24
    with pytest.raises(MoextendError, match=r"select.batch_size = 32 \(24 or 48 would do\); .*evaluate.batch_size"):
        meshes.check_rows(rows_of_settings(settings), pod)


def test_every_extension_is_evaluated_in_rows_of_its_own():
    settings = from_config_dict(load("continual"))
    sound = settings.extensions["sound"]
    evaluate = dataclasses.replace(sound.evaluate, batch_size=25)
    extensions = {**settings.extensions, "sound": dataclasses.replace(sound, evaluate=evaluate)}
    two: Any = SimpleNamespace(shape={"data": 2, "fsdp": 1, "expert": 1, "tensor": 1})
    with pytest.raises(MoextendError, match=r"evaluate:sound\.batch_size = 25"):
        meshes.check_rows(evaluation_rows(dataclasses.replace(settings, extensions=extensions)), two)


def test_select_has_batches_of_its_own_whatever_the_probe_computes_in_parts():
    """Else a number that is no multiple of the parts would end a run after align and extend have trained."""
    config = get_config("packed").to_dict()
    settings = from_config_dict(config | {"select": config["select"] | {"batch_size": 33}})
    assert settings.extend.accumulate == 2
    stage = counting_stage(settings)
    assert (stage.batch_size, stage.accumulate, stage.length) == (33, 1, settings.extend.length)


@pytest.mark.parametrize("parts", [1, 2, 4, 8, 16])
def test_the_demo_runs_on_meshes_of_a_host(parts: int):
    """The README starts it as two processes of four devices."""
    mesh: Any = SimpleNamespace(shape={"data": parts, "fsdp": 1, "expert": 1, "tensor": 1})
    meshes.check_rows(rows_of_settings(from_config_dict(get_demo())), mesh)


def test_a_run_whose_rows_do_not_divide_ends_before_its_first_step(eight_devices, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        words = ["--config.select.batch_size=100", f"--workdir={tmp_path / 'work'}"]
        cli.main(["align", f"--config={CONFIGS / 'demo.py'}", *words])
    line = capsys.readouterr().err
    assert ended.value.code == 2 and "select.batch_size = 100 (96 or 104 would do)" in line
    assert not (tmp_path / "work").exists()
