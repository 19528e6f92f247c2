"""Programs compiled for real TPUs on this CPU: expert layers, by their FLOPs, and what every command runs.

The compiler of TPUs is the optional package libtpu: `pip install -e ".[plan]"`.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from moextend_jax.config import Batch, DecoderConfig, ExtensionConfig, ModelConfig, of_pictures
from moextend_jax.generate import Generator, State
from moextend_jax.mesh import rows_sharding
from moextend_jax.models.attention import KeysValues, Visible, attend
from moextend_jax.models.decoder import Extension, MoE
from moextend_jax.models.expert_parallel import mixture
from moextend_jax.models.grouped_matmul import grouped_matmul
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.plan import topology
from moextend_jax.sharding import MESH_AXES, parameter_shardings, spec

pytest.importorskip("libtpu", reason="compiling for TPUs needs libtpu")

D, F, E, ROWS, LENGTH, TOP_K = 512, 1024, 8, 4, 1024, 2
DECODER = DecoderConfig(width=D, hidden=F, layers=1, experts=E, top_k=TOP_K)
EXTENSION = ExtensionConfig(layers=(0,), sources=(0,))
ONE_PRODUCT = 2 * ROWS * LENGTH * TOP_K * D * F
"""FLOPs of all rows through one of an expert's three matrices."""
long = pytest.mark.long  # the compiler takes 4 to 12 seconds a program
TOPOLOGIES = [pytest.param("v6e:2x2", marks=pytest.mark.slow), *(pytest.param(name, marks=long) for name in
              ("v5p:2x2x1", "v5e:2x2"))]  # fmt: skip


def sharded(module, mesh):
    """Shapes of one layer's parameters, with their shardings."""
    params = by_path(nnx.state(module, nnx.Param))
    shapes = {path: (param.axes[1:], param.shape[1:], param.dtype) for path, param in params.items()}
    return {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(axes, shape, mesh)))
        for path, (axes, shape, dtype) in shapes.items()
    }


@functools.cache
def compiled(name: str, mesh_shape: tuple[int, ...], how: Any, gradient: str):
    """The layer and, if asked for, its gradient towards `gradient`: tokens, or the extension's leaves too."""
    mesh = topology.make_mesh(topology.parse(name), dict(zip(MESH_AXES, mesh_shape, strict=True)))
    moe = nnx.eval_shape(lambda: MoE(DECODER, rngs=nnx.Rngs(0), dtype="bfloat16"))
    new = nnx.eval_shape(lambda: Extension(DECODER, EXTENSION, rngs=nnx.Rngs(0), dtype="bfloat16", std=1.0))

    config = of_pictures(decoder=DECODER, extension=EXTENSION, dispatch=how)

    def run(x_BLD, new_arrays, moe_arrays):
        this, added = with_arrays(moe, moe_arrays), with_arrays(new, new_arrays)
        y_BLD, _ = mixture(x_BLD, this, [added], extended=[jnp.array(True)], config=config)
        return y_BLD.astype(jnp.float32).sum()

    function = {"none": run, "tokens": jax.grad(run), "extension": jax.grad(run, argnums=(0, 1))}[gradient]
    x_BLD = jax.ShapeDtypeStruct(
        (ROWS, LENGTH, D), jnp.bfloat16, sharding=NamedSharding(mesh, spec("BLd", (ROWS, LENGTH, D), mesh))
    )
    with jax.set_mesh(mesh):
        return jax.jit(function).lower(x_BLD, sharded(new, mesh), sharded(moe, mesh)).compile()


def products(name: str, gradient: str) -> float:
    """FLOPs on all four chips in units of all rows through one matrix."""
    costs = compiled(name, (1, 4, 1, 1), "gather", gradient).cost_analysis()
    assert costs is not None
    return 4 * costs["flops"] / ONE_PRODUCT


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_grouped_products_do_no_flops_for_experts_not_chosen(name: str):
    """`ragged_dot` does 8 times the work on v5e and v6e. The rest, router and sums, is a few percent at these sizes."""
    # Two kernels, pretrained and new experts', each of which the compiler takes to pass over all rows.
    assert products(name, "none") == pytest.approx(2 * 3, rel=0.05)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_frozen_experts_have_no_weight_gradient(name: str):
    """Backward to the tokens: gate and up again for nobody (no remat here), three products; a weight gradient would be
    three more for pretrained experts. New experts' are three."""
    assert products(name, "tokens") == pytest.approx(2 * (3 + 3) - 2, rel=0.05)  # the forward's last product is unused
    assert products(name, "extension") - products(name, "tokens") == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("mesh_shape", "how"),
    [
        pytest.param((1, 2, 2, 1), "gather", marks=pytest.mark.slow),
        pytest.param((1, 1, 2, 2), "exchange", marks=pytest.mark.slow),
        *(pytest.param(shape, how, marks=long) for shape, how in (
            ((1, 2, 2, 1), "exchange"), ((1, 1, 4, 1), "gather"), ((1, 1, 4, 1), "exchange"), ((1, 1, 2, 2), "gather"))
        ),
    ],
)  # fmt: skip
def test_both_dispatches_compile(mesh_shape: tuple[int, ...], how: str):
    """Numbers are the same with both: only the program shows which messages it sends."""
    program = compiled("v5e:2x2", mesh_shape, how, "extension").as_text()
    assert program and ("ragged-all-to-all" in program) == (how == "exchange")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "dtype", "precision"),
    [
        ("v5p:2x2x1", 512, "float32", "highest"), ("v5e:2x2", 2052, "bfloat16", "default"),
        *(pytest.param(*case, marks=long) for case in (
            ("v5e:2x2", 512, "float32", "highest"), ("v5e:2x2", 512, "float32", "default"),
            ("v5p:2x2x1", 512, "float32", "default"), ("v6e:2x2", 2052, "bfloat16", "default"),
            ("v5e:2x2", 7, "bfloat16", "default"),
        )),
    ],
)  # fmt: skip
def test_a_chip_has_room_for_the_tiles_of_any_rows(name: str, rows: int, dtype: str, precision: str):
    """Of OLMoE's experts and their gradients: in float32, as routing is compared, and with rows of odd numbers."""
    mesh = topology.make_mesh(topology.parse(name), dict(zip(MESH_AXES, (4, 1, 1, 1), strict=True)))
    whole = NamedSharding(mesh, PartitionSpec())
    shapes = ((rows, 2048), dtype), ((64, 2048, 1024), dtype), ((64,), "int32")
    x_RD, w_GDF, sizes_G = (jax.ShapeDtypeStruct(shape, kind, sharding=whole) for shape, kind in shapes)

    def total(x_RD, w_GDF, sizes_G):
        return grouped_matmul(x_RD, (w_GDF,), sizes_G).astype(jnp.float32).sum()

    whole_each = {"in_specs": (PartitionSpec(),) * 3, "out_specs": (PartitionSpec(),) * 2, "check_vma": False}
    gradients = jax.shard_map(jax.grad(total, argnums=(0, 1)), mesh=mesh, **whole_each)
    with jax.set_mesh(mesh), jax.default_matmul_precision(precision):
        lowered = jax.jit(gradients).lower(x_RD, w_GDF, sizes_G)
        assert lowered.as_text().count("tpu_custom_call") >= 2
        assert lowered.compile().memory_analysis() is not None


@pytest.mark.slow
def test_gradients_of_new_experts_are_split_as_the_experts_are():
    """Each chip's part of the gradient is what its part of the weights is: nothing whole anywhere in the outputs."""
    analysis = compiled("v5e:2x2", (1, 2, 2, 1), "gather", "extension").memory_analysis()
    assert analysis is not None
    new_experts, x = 3 * D * F * 2, ROWS * LENGTH * D * 2
    assert analysis.output_size_in_bytes == pytest.approx((new_experts + x) / 4, rel=0.05)
    assert np.isfinite(analysis.temp_size_in_bytes)


# --- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rows_of_an_odd_length_take_no_memory_for_all_pairs_of_positions():
    """Their gradients too: XLA's attention takes 1.5 times the logits of all heads, if these exceed a core's memory."""
    mesh = topology.make_mesh(topology.parse("v5e:2x2"), dict(zip(MESH_AXES, (4, 1, 1, 1), strict=True)))
    whole, B, L, N, K, H = NamedSharding(mesh, PartitionSpec()), 4, 1904, 4, 2, 128
    shapes = ((B, L, N, H), jnp.bfloat16), ((B, L, K, H), jnp.bfloat16), ((B, L), jnp.int32)
    query, keys, segments = (jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes)

    def total(query, key, value, segments_BL):
        y_BLNH = attend(query, key, value, Visible.in_rows(segments_BL))
        return y_BLNH.astype(jnp.float32).sum()

    specs = {"in_specs": (PartitionSpec(),) * 4, "out_specs": (PartitionSpec(),) * 3, "check_vma": False}
    gradients = jax.shard_map(jax.grad(total, argnums=(0, 1, 2)), mesh=mesh, **specs)
    with jax.set_mesh(mesh):
        analysis = jax.jit(gradients).lower(query, keys, keys, segments).compile().memory_analysis()
    assert analysis is not None and analysis.temp_size_in_bytes < B * N * L * L * 4 / 8


# --- commands ---------------------------------------------------------------------------------------------------------


def test_generation_is_lowered_for_several_chips():
    """Its Pallas kernels cannot be, outside `jax.set_mesh`: a generator enters it itself."""
    mesh = topology.make_mesh(topology.parse("v5e:2x2"), dict(zip(MESH_AXES, (1, 4, 1, 1), strict=True)))
    sizes = DecoderConfig(vocab_size=512, width=128, hidden=256, layers=2, heads=4, kv_heads=2, head_size=32)
    model = abstract(ModelConfig(decoder=sizes))
    shardings = parameter_shardings(model, mesh)
    arrays = {
        path: jax.ShapeDtypeStruct(param.shape, param.dtype, sharding=shardings[path])
        for path, param in by_path(nnx.state(model, nnx.Param)).items()
    }
    rows = jax.ShapeDtypeStruct((4, 128), jnp.int32, sharding=rows_sharding(mesh))
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    prefill = Generator(model, eos=2, mesh=mesh)._prefill
    lowered = prefill.lower(arrays, Batch(rows, rows, rows, rows, rows), None, key, 0.0, room=15, top_k=1)
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.slow
def test_a_token_copies_nothing_of_the_cache():
    """Of a model whose layers are two stacks, with sinks and windows, and 537 MB of keys and values on each chip."""
    mesh = topology.make_mesh(topology.parse("v5e:2x2"), dict(zip(MESH_AXES, (4, 1, 1, 1), strict=True)))
    B, S = 32, 4096
    sizes = DecoderConfig(
        vocab_size=512, width=256, hidden=256, layers=4, heads=16, kv_heads=8, head_size=128, dense_layers=1,
        dense_hidden=256, sinks=True, local=(False, True, False, True), local_window=128,
    )  # fmt: skip

    def shaped(shape: tuple[int, ...], dtype: Any, *split: str | None) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*split)))

    model = abstract(ModelConfig(decoder=sizes))
    params = by_path(nnx.state(model, nnx.Param))
    arrays = {path: shaped(param.shape, param.dtype) for path, param in params.items()}
    cache, ids_B = shaped((4, B, 8, S, 128), jnp.bfloat16, None, "data"), shaped((B,), jnp.int32, "data")
    ended_B, seen_BS, one = shaped((B,), bool, "data"), shaped((B, S), bool, "data"), shaped((), jnp.int32)
    key, warmth = shaped((), jax.random.key(0).dtype), shaped((), jnp.float32)
    state = State(ids_B, ended_B, ids_B, seen_BS, {}, KeysValues(cache, cache), one, one, key, warmth)
    advance = Generator(model, eos=2, mesh=mesh)._advance
    used = advance.lower(arrays, state=state, steps=8, top_k=1).compile().memory_analysis()
    assert used is not None and used.temp_size_in_bytes < 0.02 * 537e6


@pytest.mark.parametrize("which", [pytest.param("some", marks=pytest.mark.slow), pytest.param("all", marks=long)])
def test_every_command_compiles_for_several_chips(tmp_path: Path, which: str):
    """What `run`, `generate`, `eval`, `routing collect` and `bench` call, noted on CPU devices, for v5e:2x2."""
    script = Path(__file__).with_name("commands_on_tpu.py")
    environment = os.environ | {"PYTHONPATH": f"{script.parent}:{script.parents[1]}"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), which],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    compiled = {line.partition(": ")[0] for line in done.stdout.splitlines()}
    assert compiled >= {"run", "generate", "eval", "routing collect", "eval --forgetting", "bench"}
