"""Plans: topologies, the readers of compiled programs against counts by hand, and what a plan says of a small model."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
import shutil
import typing
from pathlib import Path
from types import SimpleNamespace

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from configs import mixtral_methods
from configs.mixtral_8x7b import get_config
from moextend_jax import chips, cli
from moextend_jax import settings as settings_module
from moextend_jax.checkpoints import loading
from moextend_jax.checkpoints.loading import open_base
from moextend_jax.config import (
    AdapterConfig,
    DecoderConfig,
    ExtensionConfig,
    ModelConfig,
    MoextendError,
    Named,
    VisionConfig,
)
from moextend_jax.configurations import load
from moextend_jax.mesh import mesh_shape, one_device
from moextend_jax.models import flops
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path
from moextend_jax.plan import collectives, compiling, hlo, planning, products, roofline, sizes, sweep, topology, traffic
from moextend_jax.plan.abstract_step import patterns, text_only
from moextend_jax.plan.command import PlanOptions, plan_command
from moextend_jax.plan.planning import undivided
from moextend_jax.runs import results
from moextend_jax.settings import MediumSettings, RunSettings, from_config_dict

TINY = DecoderConfig(vocab_size=512, width=256, hidden=512, layers=4, heads=4, kv_heads=2, head_size=64)
TOWER = VisionConfig(width=128, hidden=256, layers=2, heads=2, image_size=56, patch_size=14)


def once(_: hlo.Instruction) -> float:
    return 1.0


def compiled(function, *arguments) -> hlo.Module:
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text() or "")


# --- topologies -------------------------------------------------------------------------------------------------------


def test_topology_names():
    assert topology.parse("v5p:4x4x4").chips == 64
    assert topology.parse("v5e:16x16").chip.platform == "tpu"
    assert topology.parse("h100:8").shape == (1, 8)
    assert topology.parse("h100:2x8").shape == (2, 8)


@pytest.mark.parametrize("name", ["v5p", "v5p:4x4", "v5e:2x2x2", "v9z:2x2", "h100:1x2x3", "v5p:0x2x2", "v5p:axbxc"])
def test_a_wrong_topology_is_a_mistake_of_the_user(name: str):
    with pytest.raises(MoextendError):
        topology.parse(name)


def test_mesh_sizes_fill_and_must_cover():
    sizes_ = {"data": 1, "fsdp": -1, "expert": 4, "tensor": 1}
    assert mesh_shape(sizes_, 64) == {"data": 1, "fsdp": 16, "expert": 4, "tensor": 1}
    with pytest.raises(MoextendError, match="does not cover"):
        mesh_shape({**sizes_, "expert": 3}, 64)


def test_a_mesh_that_jax_cannot_lay_over_the_chips_is_a_mistake_of_the_user():
    pytest.importorskip("libtpu", reason="plans for TPUs need libtpu")
    sizes_ = {"data": 1, "fsdp": -1, "expert": 1, "tensor": 8}
    with pytest.raises(MoextendError, match="cannot lay a mesh of mesh.fsdp = 10, mesh.tensor = 8 over these 80 chips"):
        topology.make_mesh(topology.parse("v5p:4x4x5"), sizes_)


# --- compiled programs ------------------------------------------------------------------------------------------------


def test_products_in_nested_loops_count_as_often_as_they_run():
    def function(x_AB, w_BB):
        def inner(x_AB, _):
            return jnp.sin(x_AB @ w_BB), None

        def outer(x_AB, _):
            return jax.lax.scan(inner, x_AB @ w_BB, length=3)[0], None

        return jax.lax.scan(outer, x_AB, length=5)[0]

    found = products.products(compiled(function, jnp.ones((8, 16)), jnp.ones((16, 16))), unknown=once)
    assert found.flops == 5 * (3 + 1) * 2 * 8 * 16 * 16


def test_backward_and_recomputed_products_are_told_apart():
    def loss(w_BB, x_AB):
        layer = jax.checkpoint(lambda x_AB: jnp.sin(x_AB @ w_BB))
        y_AB, _ = jax.lax.scan(lambda x_AB, _: (layer(x_AB), None), x_AB, length=6)
        return y_AB.sum()

    text = compiled(jax.grad(loss), jnp.ones((32, 32)), jnp.ones((8, 32)))
    one = 2 * 8 * 32 * 32
    phases = products.products(text, unknown=once).by_phase
    assert phases == {"forward": 6 * one, "recomputed": 6 * one, "backward": 2 * 6 * one}


def test_loops_whose_length_depends_on_data_are_asked_for():
    def function(n, x_BB):
        return jax.lax.fori_loop(0, n, lambda _, y_BB: jnp.sin(y_BB @ x_BB), x_BB)

    module = compiled(function, 3, jnp.ones((16, 16)))
    assert products.products(module, unknown=lambda _: 7.0).flops == 7 * 2 * 16**3


SNIPPET = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (z: f32[64,32]) -> f32[16,32] {
  %z = f32[64,32] parameter(0)
  %all = f32[64,32] all-reduce(%z), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %slice = f32[16,32] dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={16,32}
}

%condition (p: (s32[], f32[64,32])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[64,32]{1,0:T(8,128)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(12)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %p = (s32[], /*index=1*/f32[64,32]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[64,32]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-gather-start.1 = (f32[64,32], f32[256,32]) all-gather-start(%x), replica_groups=[16,4]<=[64], dimensions={0}
  %all-gather-done.1 = f32[256,32] all-gather-done(%all-gather-start.1), frontend_attributes={notes={
"broken":"{a line}"
}}, metadata={op_name="body"}
  %reduce-scatter.1 = f32[64,32] reduce-scatter(%all-gather-done.1), replica_groups=[16,4]<=[64], to_apply=%add
  ROOT %both = (s32[], f32[64,32]) tuple(%i, %reduce-scatter.1)
}

ENTRY %main (x: f32[64,32]) -> f32[64,32] {
  %x = f32[64,32]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], f32[64,32]) tuple(%zero, %x)
  %loop = (s32[], f32[64,32]) while(%start), condition=%condition, body=%body
  %y = f32[64,32] get-tuple-element(%loop), index=1
  %scattered = f32[16,32] fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="a/transpose(b)"}
  %all-reduce.1 = f32[64,32] all-reduce(%y), replica_groups=[4,16]<=[16,4]T(1,0), to_apply=%add
  %convolution.1 = f32[64,16] convolution(%y, %x), dim_labels=bf_oi->bf
  ROOT %collective-permute.1 = f32[64,32] collective-permute(%all-reduce.1), source_target_pairs={{0,1},{1,0}}
}
"""
MESH = SimpleNamespace(shape={"data": 1, "fsdp": 16, "expert": 4, "tensor": 1})


def test_collectives_count_once_per_pair_and_by_the_axes_they_cross():
    found = collectives.collectives(hlo.parse(SNIPPET), MESH, unknown=once)
    array = 64 * 32 * 4
    assert collectives.by_axis(found) == {
        "all-gather": {"expert": 12 * 3 * array},
        "reduce-scatter": {"expert": (12 * 4 * array + array) * 3 / 4},
        "all-reduce": {"fsdp": 2 * array * 15 / 16},
        "collective-permute": {"expert": array},
    }
    assert [one.phase for one in found if one.kind == "reduce-scatter"].count("backward") == 1


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, use_global_device_ids=true", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
    ],
)
def test_every_way_to_write_replica_groups(text: str, groups: list[list[int]]):
    assert collectives.parse_groups(text, 4).tolist() == groups


def test_collectives_of_a_real_program(eight_devices: None):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    lowered = jax.jit(lambda w_BC: w_BC + 1, out_shardings=whole).lower(
        jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    )
    found = collectives.collectives(hlo.parse(lowered.compile().as_text() or ""), mesh, unknown=once)
    assert collectives.by_axis(found) == {"all-gather": {"fsdp": 8 * 16 * 4 * 3 / 4}}


GROUPED = """
ENTRY %main (x: bf16[512,256], w: bf16[8,256,1024]) -> bf16[512,1024] {
  %x = bf16[512,256] parameter(0)
  %w = bf16[8,256,1024] parameter(1)
  ROOT %gmm.1 = bf16[512,1024] custom-call(%x, %w), custom_call_target="tpu_custom_call", metadata={op_name="a/gmm"}
}
"""


@pytest.mark.parametrize(
    ("target", "op_name"),
    [("tpu_custom_call", "a/gmm"), ("__gpu$xla.gpu.triton", "triton_grouped_product/pallas_call")],
)
def test_a_grouped_kernel_counts_the_rows_of_its_groups(target: str, op_name: str):
    seen = []

    def share(kernel: products.Kernel, times: float) -> float:
        seen.append(kernel)
        return 0.25

    text = GROUPED.replace("tpu_custom_call", target).replace("a/gmm", op_name).replace("%gmm.1", "%pallas_call.1")
    found = products.products(hlo.parse(text), unknown=once, share=share)
    assert found.flops == 0.25 * 2 * 512 * 256 * 1024
    assert (seen[0].groups, seen[0].matrix, seen[0].rows) == (8, (256, 1024), 512)


def test_a_kernel_that_reads_a_stack_reads_one_layer_of_it():
    """Its scope says of how many layers the weights are (`weights.reading`): of these one layer's share moves."""
    text = GROUPED.replace("a/gmm", "a/one_of_4_layers/gmm")
    moved = traffic.traffic(hlo.parse(text), unknown=once)
    assert moved == 2 * (512 * 256 + 8 * 256 * 1024 / 4 + 512 * 1024)
    assert traffic.traffic(hlo.parse(GROUPED), unknown=once) == 2 * (512 * 256 + 8 * 256 * 1024 + 512 * 1024)
    seen = []
    products.products(hlo.parse(text), unknown=once, share=lambda kernel, times: seen.append(kernel) or 1.0)
    assert seen[0].groups == 2


def test_products_through_cublas_count_what_they_contract():
    """XLA for GPU writes a product as a call whose second result is cuBLAS's workspace."""
    text = """
ENTRY %main (x: bf16[4,64,32], w: bf16[4,32,128]) -> (bf16[4,64,128], s8[1024]) {
  %x = bf16[4,64,32] parameter(0)
  %w = bf16[4,32,128] parameter(1)
  ROOT %c = (bf16[4,64,128], s8[1024]) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}
}
"""
    found = products.products(hlo.parse(text), unknown=once)
    assert found.flops == 2 * 4 * 64 * 32 * 128 and not found.uncounted


def test_products_written_as_windows_count_no_padding():
    """An outer product over a batch axis, as TPUs write it: 2 batches of [3, 4] x [4, 5]."""
    text = """
ENTRY %main (x: f32[2,3,4], w: f32[2,4,5]) -> f32[2,3,5] {
  %x = f32[2,3,4] parameter(0)
  %w = f32[2,4,5] parameter(1)
  ROOT %c = f32[2,3,5] convolution(%x, %w), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf
}
"""
    assert products.products(hlo.parse(text), unknown=once).flops == 2 * 2 * 3 * 4 * 5


def test_traffic_of_a_kernel_that_is_started_is_its_own():
    """A layer's weights sliced on another stream, as XLA for GPU does it: one of 12 matrices read, one written."""
    text = """
%fused (w: f32[12,8,16], i: s32[]) -> f32[1,8,16] {
  %w = f32[12,8,16] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %s = f32[1,8,16] dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
}

ENTRY %main (w: f32[12,8,16], i: s32[]) -> f32[1,8,16] {
  %w = f32[12,8,16] parameter(0)
  %i = s32[] parameter(1)
  %start = ((f32[12,8,16], s32[]), f32[1,8,16], u32[]) fusion-start(%w, %i), kind=kLoop, calls=%fused
  ROOT %done = f32[1,8,16] fusion-done(%start)
}
"""
    assert traffic.traffic(hlo.parse(text), unknown=once) == pytest.approx(2 * 8 * 16 * 4, abs=8)


def test_traffic_of_a_slice_inside_a_fusion_in_a_fusion_is_the_slice():
    """A layer's weights beside its product, as TPUs write it."""
    text = """
%sliced (w: f32[12,8,16], i: s32[]) -> f32[8,16] {
  %w = f32[12,8,16] parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s = f32[1,8,16] dynamic-slice(%w, %i, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %b = f32[8,16] bitcast(%s)
}

%fused (x: f32[4,8], w: f32[12,8,16], i: s32[]) -> f32[4,16] {
  %x = f32[4,8] parameter(0)
  %w = f32[12,8,16] parameter(1)
  %i = s32[] parameter(2)
  %inner = f32[8,16] fusion(%w, %i), kind=kLoop, calls=%sliced
  ROOT %c = f32[4,16] convolution(%x, %inner), dim_labels=bf_io->bf
}

ENTRY %main (x: f32[4,8], w: f32[12,8,16], i: s32[]) -> f32[4,16] {
  %x = f32[4,8] parameter(0)
  %w = f32[12,8,16] parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[4,16] fusion(%x, %w, %i), kind=kOutput, calls=%fused
}
"""
    assert traffic.traffic(hlo.parse(text), unknown=once) == pytest.approx(4 * (4 * 8 + 8 * 16 + 4 * 16), abs=8)


def test_what_is_started_reads_and_writes_once():
    text = """
ENTRY %main (x: f32[64]) -> f32[64] {
  %x = f32[64] parameter(0)
  %start = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[64]{0:S(1)} copy-done(%start)
  ROOT %far = f32[64]{0} copy(%near)
}
"""
    assert traffic.traffic(hlo.parse(text), unknown=once) == 2 * 64 * 4  # read once, and written by the last


OVERLAPPED = """
%begin (x: f32[1,32]) -> (f32[1,32], f32[8,32], u32[]) {
  %x = f32[1,32]{1,0:S(1)} parameter(0)
  %a = f32[8,32] all-gather(%x), channel_id=3, replica_groups={}, FIRST
  ROOT %c = (f32[1,32]{1,0:S(1)}, f32[8,32], u32[]{:S(2)}) custom-call(%a), custom_call_target="AsyncCollectiveStart"
}

%beside (x: f32[1,32], g: f32[8,32], s: u32[], y: f32[16]) -> (f32[16], f32[1,32], f32[8,32], f32[8,32], u32[]) {
  %x = f32[1,32]{1,0:S(1)} parameter(0)
  %g = f32[8,32] parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %y = f32[16] parameter(3)
  %t = f32[16] tanh(%y)
  %a = f32[8,32] all-gather(%x), channel_id=3, replica_groups={}, LATER
  ROOT %r = (f32[16], f32[1,32]{1,0:S(1)}, f32[8,32], f32[8,32], u32[]{:S(2)}) tuple(%t, %x, %g, %a, %s)
}

%end (x: f32[1,32], g: f32[8,32], s: u32[]) -> f32[8,32] {
  %x = f32[1,32]{1,0:S(1)} parameter(0)
  %g = f32[8,32] parameter(1)
  %s = u32[]{:S(2)} parameter(2)
  %a = f32[8,32] all-gather(%x), channel_id=3, replica_groups={}, LATER
  ROOT %c = f32[8,32] custom-call(%x, %g, %a, %s), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[1,32], y: f32[16]) -> (f32[8,32], f32[16]) {
  %x = f32[1,32]{1,0:S(1)} parameter(0)
  %y = f32[16] parameter(1)
  %b = (f32[1,32]{1,0:S(1)}, f32[8,32], u32[]{:S(2)}) fusion(%x), \
output_to_operand_aliasing={{0}: (0, {})}, calls=%begin
  %x1 = f32[1,32]{1,0:S(1)} get-tuple-element(%b), index=0
  %g1 = f32[8,32] get-tuple-element(%b), index=1
  %s1 = u32[]{:S(2)} get-tuple-element(%b), index=2
  %m = (f32[16], f32[1,32]{1,0:S(1)}, f32[8,32], f32[8,32], u32[]{:S(2)}) fusion(%x1, %g1, %s1, %y), \
output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}, calls=%beside
  %t = f32[16] get-tuple-element(%m), index=0
  %x2 = f32[1,32]{1,0:S(1)} get-tuple-element(%m), index=1
  %g2 = f32[8,32] get-tuple-element(%m), index=2
  %s2 = u32[]{:S(2)} get-tuple-element(%m), index=4
  %e = f32[8,32] fusion(%x2, %g2, %s2), output_to_operand_aliasing={{}: (1, {})}, calls=%end
  ROOT %r = (f32[8,32], f32[16]) tuple(%e, %t)
}
"""
for _part, _flags in {"FIRST": '"flag_end":"-1","flag_start":"-1"', "LATER": '"flag_end":"8","flag_start":"2"'}.items():
    OVERLAPPED = OVERLAPPED.replace(_part, f'backend_config={{"async_collective_fusion_config":{{{_flags}}}}}')


def test_a_gather_that_is_overlapped_counts_once():
    """A TPU writes it as three fusions, of which each names it, and hands its memory from one to the next."""
    module, mesh = hlo.parse(OVERLAPPED), SimpleNamespace(shape={"data": 1, "fsdp": 8, "expert": 1, "tensor": 1})
    (found,) = collectives.collectives(module, mesh, unknown=once)
    assert found.kind == "all-gather" and found.nbytes == 7 * 32 * 4
    assert traffic.traffic(module, unknown=once) == 4 * (8 * 32 + 2 * 16)  # what is gathered, and beside it tanh


def test_traffic_of_a_scan_reads_each_slice_once():
    module = compiled(lambda x_ZB: jax.lax.scan(lambda c, x_B: (c + x_B, None), jnp.zeros(4096), x_ZB)[0],
                      jnp.ones((50, 4096)))  # fmt: skip
    moved = traffic.traffic(module, unknown=once)
    least = 50 * 4096 * 4
    assert least <= moved <= 10 * least  # and not 50 times all slices


# --- counts from sizes ------------------------------------------------------------------------------------------------


def imported(folder: Path) -> Path:
    base = tiny.write_base(folder / "base")
    cli.call(["import", str(base), str(folder / "both"), f"--vision={base / 'vision'}"])
    return folder / "both"


def without_tower(folder: Path) -> Path:
    shutil.rmtree(tiny.write_base(folder) / "vision")
    return folder


BASES = {
    "imported": imported,
    "tower beside": tiny.write_base,
    "released": lambda folder: folders.released(folder, config=folders.ALIGNED),
    "without tower": without_tower,
}


@pytest.mark.parametrize("vision", ["", "embedded", "none", "clip-vit-large-patch14-336"])
@pytest.mark.parametrize("base", BASES)
def test_the_tower_is_the_one_that_the_run_has(vision: str, base: str, tmp_path: Path):
    """A tower that the base brings goes before the embedded one."""
    medium = "" if vision == "none" else "image"
    settings = tiny.run_settings(base=str(BASES[base](tmp_path)), vision=vision, medium=medium)
    if base == "without tower" and not vision:
        with pytest.raises(MoextendError, match="has no vision tower of its own"):
            sizes.model_config(settings, stage="finetune")
        return
    planned = sizes.model_config(settings, stage="finetune").vision
    if vision.startswith("clip"):
        assert planned == sizes.TOWERS[vision]
    else:
        opened = open_base(settings.base, vision, feature_layer=settings.recipe.feature_layer).config.vision
        assert planned == opened and (planned is None) == (vision == "none")
    assert sizes.model_config(text_only(settings), stage="finetune").vision is None


def test_a_plan_takes_the_embedded_tower_of_a_mediums_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders.clip(tmp_path / "vision")  # of other sizes than the package's for sounds
    monkeypatch.setattr(loading, "EMBEDDED", tmp_path)
    media = {"film": MediumSettings(kind="video", tower="embedded")}
    settings = dataclasses.replace(from_config_dict(get_config()), media=media)
    tower = sizes.model_config(settings, stage="align").media["film"].tower
    assert tower == dataclasses.replace(tiny.VISION, feature_layer=settings.recipe.feature_layer)


def mixtral(**changes: typing.Any):
    settings = text_only(dataclasses.replace(from_config_dict(get_config()), **changes))
    return sizes.model_config(settings, stage="extend")


def test_the_anchor_is_8_times_weights_times_tokens():
    """MaxText's full training of Mixtral-8x7B does 12.94 TFLOP per layer and chip at 4,096 tokens per chip."""
    full = flops.full_training(mixtral(), rows=128, length=2048, items={"image": 0})
    weights = {name: phases for name, phases in full.parts.items() if name not in ("head", "attention/scores")}
    per_layer = sum(sum(phases.values()) for phases in weights.values()) / 32 / 64
    assert per_layer == pytest.approx(12.94e12, rel=5e-3)


def test_router_training_needs_no_weight_gradient_and_less_than_6_times():
    extend = flops.step_flops(mixtral(), trains=("decoder/layers/moe/gate",), rows=128, length=2048, items={"image": 0})
    gate = 2 * 32 * 128 * 2048 * 4096 * 8
    assert extend.by_phase()["weight_gradients"] == gate
    weights = {name: phases for name, phases in extend.parts.items() if name not in ("head", "attention/scores")}
    per_layer = sum(sum(phases.values()) for phases in weights.values()) / 32 / 64
    assert per_layer < 9.70e12


def test_what_all_tokens_pass_is_computed_again_as_the_rest_of_its_layer():
    decoder = dataclasses.replace(tiny.DECODER, shared_hidden=16, dense_layers=1, dense_hidden=32)
    config = dataclasses.replace(tiny.EXTENDED, decoder=decoder, remat="layer", extensions=Named())
    parts = flops.step_flops(config, trains=("decoder/*",), rows=2, length=16, items={"image": 0}).parts
    for name in ("shared/gate", "shared/up", "dense/shared/up", "dense/attention/query", "attention/query"):
        assert parts[name]["recomputed"] == parts[name]["forward"] > 0, name
    assert parts["dense/shared/down"]["recomputed"] == 0  # nothing needs it again
    full = flops.full_training(config, rows=2, length=16, items={"image": 0}).parts
    assert full["dense/shared/down"]["recomputed"] == full["dense/shared/down"]["forward"] > 0


def test_what_low_rank_updates_recompute_with_attention_is_counted():
    lora = AdapterConfig(method="lora", rank=2, alpha=4.0, trains=True)
    config = dataclasses.replace(tiny.PLAIN, remat="attention", adapters=Named(lora=lora))
    parts = flops.step_flops(config, trains=("adapters/*",), rows=2, length=16, items={"image": 0}).parts
    again = {name for name, of in parts.items() if name.startswith("adapters/") and of["recomputed"]}
    assert again == {f"adapters/{name}/{of}" for name in ("query", "key", "value") for of in "ab"} | {"adapters/out/a"}


def test_every_remat_policy_of_the_settings_is_counted():
    assert set(typing.get_args(typing.get_type_hints(settings_module.RunSettings)["remat"])) == set(flops.RECOMPUTED)


def test_published_sizes_without_files():
    config = sizes.model_config(from_config_dict(get_config()), stage="finetune")
    assert config.decoder == DecoderConfig() and config.vision == VisionConfig()
    assert config.extension is not None and len(config.extension.layers) == 16
    windows = dataclasses.replace(from_config_dict(get_config()), base="gpt-oss-20b")
    assert sizes.model_config(windows, stage="align", layers=3).decoder.local == (True, False, True)
    wrong = dataclasses.replace(from_config_dict(get_config()), base="Mixtral-9x9B")
    with pytest.raises(MoextendError, match="Mixtral-9x9B"):
        sizes.model_config(wrong, stage="align")


def test_a_closed_ring_is_twice_as_fast_as_an_open_one():
    """A ring over the whole side of a slice of whole cubes, that is: half a side has ends, and smaller slices too."""
    v5p = chips.chip("v5p")

    def bandwidth(sides: tuple[int, int], mesh: tuple[int, ...], *axes: str) -> float:
        devices = np.array([SimpleNamespace(coords=(x, y, 0)) for x in range(sides[0]) for y in range(sides[1])])
        named = SimpleNamespace(devices=devices.reshape(mesh), axis_names=("data", "fsdp", "expert", "tensor"))
        return roofline.axis_bandwidth(v5p, named, axes) / v5p.link

    assert bandwidth((4, 4), (1, 4, 4, 1), "fsdp") == 2
    assert bandwidth((4, 4), (1, 4, 4, 1), "fsdp", "expert") == 4
    assert bandwidth((8, 4), (2, 4, 4, 1), "fsdp") == 1 and bandwidth((8, 4), (2, 4, 4, 1), "data", "fsdp") == 2
    assert bandwidth((4, 2), (1, 4, 2, 1), "fsdp") == 1 and bandwidth((4, 2), (1, 4, 2, 1), "fsdp", "expert") == 2


# --- whole plans ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> RunSettings:
    """The 8x7B configuration with the sizes made small."""
    monkeypatch.setitem(sizes.DECODERS, "Mixtral-8x7B-Instruct-v0.1", TINY)
    monkeypatch.setitem(sizes.TOWERS, "clip-vit-large-patch14-336", TOWER)
    settings = from_config_dict(get_config())
    short = {"batch_size": 8, "length": 128, "loss_chunk": 64}
    stages = {name: dataclasses.replace(getattr(settings, name), **short) for name in ("extend", "finetune")}
    mesh = {"data": 1, "fsdp": -1, "expert": 1, "tensor": 1}
    return dataclasses.replace(settings, mesh=mesh, saved=(), **stages)


@pytest.mark.slow
def test_a_plan_compiled_for_a_tpu(small: RunSettings, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("libtpu", reason="plans for TPUs need libtpu")
    plan_command(PlanOptions(small, stage="finetune", topology="v5p:2x2x1", json=True))
    figures = json.loads(capsys.readouterr().out)
    held, counted = figures["bytes_per_chip"], figures["flops_per_step"]
    assert figures["fits"] and figures["chips"] == 4
    arguments = sum(held[kind] for kind in ("frozen", "trainable", "optimizer", "batch", "padding"))
    assert held["total"] == arguments + held["outputs"] - held["aliased"] + held["temporaries"] + held["code"]
    assert held["padding"] >= 0 and held["optimizer"] == pytest.approx(2 * held["trainable"], rel=0.01)
    # the donated state is written in place
    assert held["aliased"] >= 0.99 * (held["trainable"] + held["optimizer"])
    assert counted["total"] == pytest.approx(sum(counted[phase] for phase in flops.PHASES))
    assert counted["compiled_over_analytic"] == pytest.approx(1, abs=0.06)  # attention here computes its masked half
    assert not counted["uncounted_kernels"]
    assert counted["total"] < counted["full_training"]
    assert figures["step_seconds"] > 0 and 0 < figures["mfu"] < 1 and figures["compile_seconds"] > 0
    assert figures["collective_bytes_per_chip"]["all-gather"]["fsdp"] > 0
    leaves = by_path(nnx.state(abstract(sizes.model_config(small, stage="finetune"))))
    new = [leaf.size for path, leaf in leaves.items() if path.startswith("extensions/")]
    assert figures["trained_parameters"] == sum(new) > 0


def test_what_a_mesh_does_not_divide_is_said():
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 1, "expert": 8, "tensor": 1})
    config = ModelConfig(decoder=sizes.DECODERS["Qwen1.5-MoE-A2.7B"])
    assert undivided(config, mesh) == ["60 experts on an axis expert of 8"]
    whole = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, experts=64))
    assert undivided(whole, mesh) == []
    mesh = SimpleNamespace(shape={"data": 1, "fsdp": 128, "expert": 1, "tensor": 1})
    config = ModelConfig(decoder=sizes.DECODERS["gpt-oss-120b"])
    assert undivided(config, mesh) == ["2880 channels on an axis fsdp of 128"]


@pytest.mark.parametrize("changes", [{}, {"wide": 2}, {"start": "added"}])
def test_picks_of_new_experts_are_the_same_whichever_buffer_they_are_in(changes: dict[str, typing.Any]):
    """Two new experts beside eight, in every layer, on one chip: a fifth of all picks. They share the buffer of the
    others, or have one of their own with two rows for each token of three picks."""
    sources = (0,) * 8 * changes.get("wide", 1)
    added = ExtensionConfig(layers=(0, 1, 2, 3), sources=sources, new_experts=2, medium="", **changes)
    decoder = dataclasses.replace(TINY, top_k=3)
    config = ModelConfig(decoder=decoder, extensions=Named(x=added))
    run = dataclasses.replace(from_config_dict(get_config()).finetune, batch_size=2, length=64, accumulate=1)
    rows = 2 * 64 * (2 if changes else 3)
    kernel = products.Kernel(2, (decoder.width, added.wide * decoder.hidden), rows)
    real = rows * planning._share(config, run, one_device(), None)(kernel, 4.0)
    assert real == pytest.approx(2 * 64 * 3 / 5)


def test_a_sweep_counts_what_is_saved_only_where_there_is_a_backward_pass(small: RunSettings):
    """Above the lowest extended layer; else combinations that fit would never be compiled."""
    place = topology.parse("v5p:1x1x1")

    def least(rule: typing.Any) -> int:
        settings = dataclasses.replace(small, select=dataclasses.replace(small.select, layers=rule))
        of_mesh = sweep.MeshBytes(one_device(), 0, 0)
        return sweep.estimate(settings, of_mesh, stage="finetune", place=place).least_bytes

    assert least("second_half") * 2 == least("all") > 0


def test_a_sweep_counts_gathered_weights_only_where_they_are_split(small: RunSettings):
    """With all of the weights on a chip nothing is gathered."""
    place, frozen = topology.parse("v5p:2x1x1"), 1 << 20

    def least(fsdp: int, frozen: int) -> int:
        mesh = jax.sharding.AbstractMesh((1, fsdp, 1, 1), ("data", "fsdp", "expert", "tensor"))
        of_mesh = sweep.MeshBytes(typing.cast(typing.Any, mesh), 0, frozen)
        return sweep.estimate(small, of_mesh, stage="finetune", place=place).least_bytes

    assert least(1, frozen) == least(1, 0) and least(2, frozen) > least(2, 0)


def test_a_sweep_tries_only_what_divides(small: RunSettings):
    place = topology.parse("v5p:2x2x1")
    found = list(sweep.choices(small, stage="finetune", place=place))
    meshes = {tuple(one.mesh.values()) for one in found}
    assert (1, 4, 1, 1) in meshes and (1, 1, 2, 2) in meshes
    assert all(math.prod(mesh) == 4 and mesh[3] <= TINY.kv_heads for mesh in meshes)


def test_a_sweep_sets_the_stage_of_a_later_extension():
    settings = from_config_dict(load("continual"))
    chosen = results.with_stages(settings, {"finetune:sound": dataclasses.replace(settings.finetune, accumulate=4)})
    assert chosen.extensions["sound"].finetune.accumulate == 4 and chosen.finetune.accumulate == 1
    chosen = results.with_stages(settings, {"finetune": dataclasses.replace(settings.finetune, accumulate=4)})
    assert chosen == dataclasses.replace(settings, finetune=dataclasses.replace(settings.finetune, accumulate=4))


def test_a_sweep_of_which_nothing_compiles_is_an_error(small: RunSettings, monkeypatch):
    pytest.importorskip("libtpu", reason="plans for TPUs need libtpu")
    told: list[str] = []

    def failing(*_: str, settings: RunSettings, on_cpu: bool):
        raise MoextendError("no such layout")

    monkeypatch.setattr(sweep, "apart", failing)
    with pytest.raises(MoextendError, match="none of the 2 programs that were tried could be compiled"):
        sweep.sweep(small, stage="finetune", topology_name="v5p:2x2x1", most=2, within=None, tell=told.append)
    assert told.count("   failed: no such layout") == 2


@pytest.mark.parametrize("options", [{"sweep": True, "layers": 2}, {"most": 3}, {"within": 5.0}])
def test_options_that_would_mean_nothing_are_refused(small: RunSettings, options: dict[str, typing.Any]):
    with pytest.raises(MoextendError, match="--sweep"):
        plan_command(PlanOptions(small, stage="finetune", topology="v5p:2x2x1", **options))


def test_too_big_for_the_chip_is_not_too_big_for_a_kernel():
    hbm = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 1.5G of 95.74G hbm."
    assert compiling.memory_needed(hbm) == 1.5 * 2**30
    vmem = "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while ..."
    assert compiling.memory_needed(vmem) is None and compiling.memory_needed("INTERNAL: what") is None


def test_a_sweep_ranks_what_fits_and_keeps_within(small: RunSettings, monkeypatch):
    """What is compiled is the most promising by estimate; the ranking goes by what was compiled."""
    pytest.importorskip("libtpu", reason="plans for TPUs need libtpu")
    asked = []

    def compiled(*_: str, settings: RunSettings, on_cpu: bool):
        asked.append(settings)
        total = 2**30 * len(asked)
        return {"fits": len(asked) != 1, "bytes_per_chip": {"total": total}, "step_seconds": 1 / len(asked)}

    monkeypatch.setattr(sweep, "apart", compiled)
    found = sweep.sweep(small, stage="finetune", topology_name="v5p:2x2x1", most=4, within=3.0, tell=lambda text: None)
    assert [plan["bytes_per_chip"]["total"] // 2**30 for plan in found] == [3, 2, 4, 1]
    assert [plan["fits"] for plan in found] == [True, True, False, False]
    assert len({tuple(one.mesh.values()) for one in asked}) > 1
    with pytest.raises(MoextendError, match="does not fit into 0.0 GiB"):
        sweep.sweep(small, stage="finetune", topology_name="v5p:2x2x1", most=4, within=1e-4, tell=lambda text: None)


@pytest.mark.parametrize("stage, name, match", [
    ("finetune", "v5p:9x9x9", "libtpu|v5p:9x9x9"), ("select", "v5p:2x2x1", "stage"),
])  # fmt: skip
def test_mistakes_are_named(small: RunSettings, stage, name: str, match: str):
    pytest.importorskip("libtpu", reason="plans for TPUs need libtpu")
    with pytest.raises(MoextendError, match=match):
        plan_command(PlanOptions(small, stage=stage, topology=name))


def test_attention_in_a_window_costs_what_the_window_holds():
    """Queries see themselves and at most three before them in every second layer; all before them in the others."""
    scores = {}
    for local in ((), (True, False) * 2):
        decoder = dataclasses.replace(TINY, local=local, local_window=4 if local else 0)
        config = dataclasses.replace(mixtral(), decoder=decoder, extensions={})
        counted = flops.step_flops(config, trains=(), rows=2, length=64, items={})
        scores[local] = counted.parts["attention/scores"]["forward"]
    inside = sum(min(at + 1, 4) for at in range(64))
    assert scores[(True, False) * 2] / scores[()] == pytest.approx((inside + 64**2 / 2) / 64**2, rel=0.02)


@pytest.mark.parametrize(("kernel", "times"), [("forward", 2), ("query", 3), ("key", 4)])
def test_attention_of_gpus_counts_the_causal_half(kernel: str, times: int):
    text = """HloModule jit_step, is_scheduled=true

ENTRY %main (q: bf16[2,64,4,16], k: bf16[2,64,2,16]) -> bf16[2,64,4,16] {
  %q = bf16[2,64,4,16]{3,2,1,0} parameter(0)
  %k = bf16[2,64,2,16]{3,2,1,0} parameter(1)
  ROOT %c = bf16[2,64,4,16]{3,2,1,0} custom-call(%q, %k), TARGET
}
"""
    target = f'custom_call_target="__gpu$xla.gpu.triton", metadata={{op_name="jit(step)/triton_attention_{kernel}"}}'
    text = text.replace("TARGET", target)
    done = products.products(hlo.parse(text), unknown=lambda _: 1.0)
    assert not done.uncounted and done.flops == times * 2 * (2 * 4 * 64 * 64 * 16) / 2


METHODS = {
    "lora": 1_920_991_232 + 20_979_712, "qlora": 960_495_616 + 20_979_712, "mole": 197_525_600, "moram": 6_815_744,
    "damc": 671_088_640 + 20_979_712, "blocks": 2_902_540_288, "dymoe": 2_818_642_432, "upcycling": 2_818_642_432,
}  # fmt: skip
"""Trained parameters, with those of the projector where it is trained too; of connectors whatever it is."""


@pytest.mark.parametrize("name", typing.get_args(mixtral_methods.Name))
def test_every_rival_is_planned_with_as_many_parameters_as_it_trains(name: str):
    settings = from_config_dict(load(f"mixtral_methods:{name}"))
    stage = results.table(settings).training(optional=False)[-1]
    leaves = by_path(nnx.state(abstract(sizes.model_config(settings, stage=stage))))
    trains = patterns(settings, stage=stage)
    trained = {path: leaf.size for path, leaf in leaves.items() if any(fnmatch.fnmatchcase(path, of) for of in trains)}
    assert sum(trained.values()) == METHODS.get(name, sum(trained.values())) > 0
    if name not in METHODS:
        assert all(path.startswith("media/depth/projector/") for path in trained)
