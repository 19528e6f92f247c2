"""Experts in few bits: the arithmetic, what is read from files, and runs over such a base."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import folders
import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import SingleDeviceSharding
from tiny import few

from moextend_jax import cli
from moextend_jax.checkpoints import convert, hashes, mxfp4, quantising, train_state, transformers_layout
from moextend_jax.checkpoints.leaves import read_sharded
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.checkpoints.tensors import Stored
from moextend_jax.commands import whole_run
from moextend_jax.config import RECIPES, MoextendError, Quantised
from moextend_jax.extension.grow import grow, read_by_grow
from moextend_jax.mesh import one_device
from moextend_jax.models.moextend import abstract
from moextend_jax.models.quantised import STORAGES, dequantise, quantise
from moextend_jax.parameters import with_arrays
from moextend_jax.plan.memory import shard_bytes
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.place import Place
from moextend_jax.settings import EvaluateSettings, RunSettings, SelectSettings, StageSettings
from moextend_jax.train import stages

GROUP = 8
KINDS = sorted(STORAGES)
ERROR = {"int8": 0.008, "int4": 0.12, "mxfp4": 0.13, "nf4": 0.09}
"""Of normal weights in groups of 8, relative; in groups of 64 it is 0.006 and 0.095, of 32 in mxfp4 0.11."""

STEP = {"int8": 1, "int4": 1, "mxfp4": 2, "nf4": 0.16}
"""The largest error, in scales."""
LARGEST = {"int8": 126.9, "int4": 7.9, "mxfp4": 1.9, "nf4": 6.2}
"""Of a group's largest weight, at least, in steps."""


def matrices(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_comes_back_within_its_groups_step(kind: str):
    w_IO = matrices(3, 64, 10)
    values, scale = quantise(w_IO, kind, GROUP)
    assert values.shape == w_IO.shape and values.dtype == STORAGES[kind].dtype
    assert scale.shape == (3, 8, 10) and scale.dtype == STORAGES[kind].scale_dtype
    again = np.asarray(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32))
    step = np.repeat(np.abs(scale.astype(np.float32)), GROUP, axis=-2) * STEP[kind]
    # The largest of a group is the last integer; its opposite, if as large, is one short of what can be said.
    assert (np.abs(again - w_IO) <= step * 1.001).all()
    assert np.linalg.norm(again - w_IO) / np.linalg.norm(w_IO) < ERROR[kind]
    largest = np.abs(again / step).reshape(3, 8, GROUP, 10).max(axis=2)
    assert (largest >= LARGEST[kind]).all()


@pytest.mark.parametrize(("kind", "theirs"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_what_gguf_has_quantised_stays_exactly_that(kind: str, theirs: str):
    how = gguf.GGMLQuantizationType[theirs]
    w_OI = gguf.quants.dequantize(gguf.quants.quantize(matrices(40, 96), how), how)
    values, scale = quantise(w_OI.T, kind, 32)
    np.testing.assert_array_equal(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32), w_OI.T)


def test_files_of_four_bits_whose_largest_integer_is_seven_stay_exact():
    """llama.cpp's Q4_0 with an importance matrix chooses the scale that errs least, and -7 or 7 for the largest weight;
    so it is in groups beside others."""
    rng = np.random.default_rng(0)
    d_gO = rng.normal(0, 0.01, (6, 40)).astype(np.float16).astype(np.float32)
    values = rng.integers(-7, 8, (6, 32, 40))
    values[np.arange(6) % 2 == 0, 5] = 7
    values[np.arange(6) % 2 == 1, 9] = -8
    w = (values * d_gO[:, None]).reshape(192, 40)
    stored, scale = quantise(w, "int4", 32)
    np.testing.assert_array_equal(dequantise(jnp.asarray(stored), jnp.asarray(scale), jnp.float32), w)
    noisy = w + rng.normal(0, 1e-4, w.shape).astype(np.float32)  # where it is no file's, the whole range is used
    assert (np.abs(quantise(noisy, "int4", 32)[0].astype(np.int8)).reshape(6, 32, 40).max(axis=1) == 8).all()


def test_four_bits_of_the_largest_weights_that_can_be_stored():
    w_IO = np.full((GROUP, 1), -8 * 61440, np.float32)  # a seventh of it is no float16
    values, scale = quantise(w_IO, "int4", GROUP)
    np.testing.assert_array_equal(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32), w_IO)


def test_four_bits_of_mxfp4_say_what_its_standard_says():
    """Nearest, ties to the even code, 6 for all that is more; beside ml_dtypes' own."""
    w = np.linspace(-7.9, 7.9, 633, dtype=np.float32)
    w[0] = 7.9
    w = np.concatenate([w, [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.75], np.zeros(31)]).astype(np.float32)[:, None]
    values, scale = quantise(w, "mxfp4", len(w))
    assert scale.item() == 1
    got = dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32)
    np.testing.assert_array_equal(got, w.astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_quantised_stays_as_it_is(kind: str):
    """So files that hold such integers and float16 scales, as GGUF's Q4_0 does, would be held exactly."""
    values, scale = quantise(matrices(32, 6), kind, GROUP)
    w = np.asarray(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32))
    again, scale_again = quantise(w, kind, GROUP)
    np.testing.assert_array_equal(again.astype(np.int8), values.astype(np.int8))
    np.testing.assert_array_equal(scale_again, scale)


def test_zeros_and_the_smallest_weights_are_numbers():
    w = np.zeros((16, 2), np.float32)
    w[8:, 1] = 1e-9
    values, scale = quantise(w, "int4", GROUP)
    assert (values[:8].astype(np.int8) == 0).all() and np.isfinite(scale.astype(np.float32)).all()
    assert np.abs(np.asarray(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32)) - w).max() <= 1e-6


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_numbers_are_refused_by_name(kind: str, weight: float):
    """Or that float16 has no scale for; of mxfp4 and nf4, the largest float32 is one."""
    w = matrices(16, 2)
    w[9, 1] = weight
    if weight == 3e38 and kind in ("mxfp4", "nf4"):
        values, scale = quantise(w, kind, GROUP)
        assert np.asarray(dequantise(jnp.asarray(values), jnp.asarray(scale), jnp.float32))[9, 1] > 2.5e38
        return
    path = quantising.MATRICES[1]
    leaf = folders.source_of(tiny.EXTENDED).leaves[path]._replace(part=lambda *_: w, where="model.safetensors")
    for of in quantising.stored({path: leaf}, Quantised(kind, GROUP)).values():
        with pytest.raises(MoextendError, match=rf"^model.safetensors: {path}\[1, 2\]: weights .* stored in {kind}"):
            of.ours((1, 2))


def test_scales_of_mxfp4_files_that_stand_for_nan_are_refused():
    def stored(array: np.ndarray) -> Stored:
        return Stored(array.shape, array.dtype, lambda: array, "model.safetensors")

    blocks, scales = np.full((2, 3, 1, 16), 0x21, np.uint8), np.full((2, 3, 1), mxfp4.BIAS, np.uint8)
    whole = mxfp4.unpacked({"up_blocks": stored(blocks), "up_scales": stored(scales)}, "up")["up"]
    np.testing.assert_array_equal(whole.read(), np.tile(np.array([0.5, 1] * 16, np.float32)[:, None], (2, 1, 3)))
    scales[1, 2, 0] = 255
    for read in (whole.read, whole.part((1,)).read):
        with pytest.raises(MoextendError, match="model.safetensors: up_scales has NaN"):
            read()
    assert np.isfinite(whole.part((0,)).read().astype(np.float32)).all()


# --- read from files --------------------------------------------------------------------------------------------------


def config_of(kind: Any, **more: Any):
    return dataclasses.replace(tiny.EXTENDED, expert_storage=kind, expert_group=GROUP, **more)


def arrays_of(kind: Any, *, seed: int = 0) -> dict[str, jax.Array]:
    """The tiny model as a run reads it."""
    leaves = quantising.stored(folders.source_of(tiny.EXTENDED, seed=seed).leaves, config_of(kind).quantised)
    shardings = dict.fromkeys(leaves, SingleDeviceSharding(jax.local_devices()[0]))
    return read_sharded(leaves, shardings, dtype="float32")


def as_plain(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights that integers and scales stand for."""
    plain = {path: leaf for path, leaf in arrays.items() if not path.endswith("_scale")}
    for path in quantising.MATRICES:
        plain[path] = dequantise(arrays[path], arrays[f"{path}_scale"], jnp.float32)
    return plain


@pytest.mark.parametrize("kind", few(KINDS, "int8"))
def test_a_model_reads_as_its_structure_says(kind: Any):
    arrays, model = arrays_of(kind), abstract(config_of(kind))
    whole = jax.tree.map(jnp.asarray, folders.arrays(tiny.EXTENDED, dtype=np.float32))
    for path in quantising.MATRICES:
        values, scale = quantise(np.asarray(whole[path]), kind, GROUP)
        np.testing.assert_array_equal(arrays[path].astype(jnp.int8), values.astype(np.int8))
        np.testing.assert_array_equal(arrays[f"{path}_scale"], scale)
    batch = jax.tree.map(jnp.asarray, tiny.batch())
    hidden = with_arrays(model, arrays)(batch).hidden_BLD
    expected = with_arrays(abstract(tiny.EXTENDED), as_plain(arrays))(batch).hidden_BLD
    np.testing.assert_allclose(hidden, expected, atol=1e-6, rtol=0)
    assert np.abs(hidden - with_arrays(abstract(tiny.EXTENDED), whole)(batch).hidden_BLD).max() > 1e-3


def test_any_part_of_a_matrix_has_the_bits_of_the_whole():
    leaves = folders.source_of(tiny.EXTENDED).leaves
    stored = quantising.stored(leaves, Quantised("int4", GROUP))
    for path in quantising.MATRICES:
        whole = stored[path].ours((1, 2))
        np.testing.assert_array_equal(stored[path].part((1, 2), (slice(3, 13), slice(1, 4))), whole[3:13, 1:4])
    assert not {path for path in stored if path.endswith("_scale")} - {f"{path}_scale" for path in quantising.MATRICES}


def test_groups_must_divide_what_a_device_has():
    mesh = one_device()
    quantising.check(tiny.DECODER, Quantised("int8", 8), mesh)
    with pytest.raises(MoextendError, match="expert_group = 16: it does not divide the experts' width of 24"):
        quantising.check(tiny.DECODER, Quantised("int8", 16), mesh)


def test_a_plan_counts_two_int4_to_a_byte():
    one = SingleDeviceSharding(jax.devices()[0])
    leaf = {kind: jax.ShapeDtypeStruct((3, 5), kind, sharding=one) for kind in ("int4", "int8", "bfloat16")}
    assert {kind: shard_bytes(leaf[kind]) for kind in leaf} == {"int4": 8, "int8": 15, "bfloat16": 30}


# --- written once -----------------------------------------------------------------------------------------------------


@pytest.fixture
def imported(tmp_path: Path):
    """The tiny base as published, and the function that imports it with more words on the command line."""
    base = tiny.write_base(tmp_path / "base")

    def bring_in(name: str, *words: str) -> Path:
        assert cli.call(["import", str(base), str(tmp_path / name), *words]) in (0, None)
        return tmp_path / name

    return base, bring_in


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_imported_in_few_bits_has_the_bits_of_what_is_read_in_few_bits(kind: Any, imported):
    base, _ = imported
    group, folder = 8, base.with_name("few")
    how = Quantised(kind, group)
    convert.import_source(open_source(base), folder, storage=how)  # since the command takes mxfp4 in groups of 32 alone
    ours, theirs = open_source(folder), open_source(base)
    assert hashes.base_hashes(ours.leaves) == hashes.base_hashes(theirs.leaves)
    model = open_checkpoint(folder)
    assert model.config.quantised == how and folders.base_hash(model) == hashes.base_hashes(theirs.leaves).base
    expected = open_checkpoint(base, storage=how).arrays
    folders.assert_same(model.arrays, expected)
    shards = quantising.stored(ours.leaves, how)[quantising.MATRICES[0]]
    whole = np.asarray(expected[quantising.MATRICES[0]][1, 2])
    np.testing.assert_array_equal(shards.part((1, 2), (slice(3, 13), slice(1, 4))), whole[3:13, 1:4])
    bits = 8 if kind == "int8" else 4
    size = {path: sum(part.shape[-2] * part.dtype.itemsize for part in leaf.few_bits.parts.values())
            for path, leaf in ours.leaves.items() if leaf.few_bits}  # fmt: skip
    assert size[quantising.MATRICES[0]] == 16 * bits // 8 + 16 // group * STORAGES[kind].scale_dtype.itemsize


def test_what_is_in_few_bits_is_refused_as_anything_else(imported, capsys, monkeypatch: pytest.MonkeyPatch):
    base, bring_in = imported
    folder = bring_in("few", "--storage", "int4", "--group", "8")
    how = "the experts are in int4 in groups of 8, as they were imported: set expert_storage=int4 and expert_group=8"
    with pytest.raises(MoextendError, match=how):
        open_checkpoint(folder, storage=Quantised("int8", 8))
    with pytest.raises(MoextendError, match=how):
        quantising.stored(open_source(folder).leaves, None)
    with monkeypatch.context() as patch:
        for module in (convert, transformers_layout):
            patch.setattr(module, "watched", lambda *_: pytest.fail("something was to be written"))
        for words in (["import"], ["export"], ["export", "--layout=hf"], ["export", "--layout=released"]):
            with pytest.raises(SystemExit) as exit:
                cli.main([*words, str(folder), str(folder.with_name("out"))])
            said = "in int4 in groups of 8, as they were imported, and cannot be exported or imported again: use the"
            assert exit.value.code == 2 and said in capsys.readouterr().err
    assert cli.call(["export", str(folder), str(folder.with_name("tower")), "--layout", "clip"]) in (0, None)
    for words, message in (
        (["--storage", "int4", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--group", "8"], "--group goes with --storage"),
        (["--storage", "int4"], "expert_group = 64: it does not divide the experts' width of 16"),
        (["--storage", "int3"], "int3"),
    ):
        with pytest.raises(SystemExit) as exit:
            cli.main(["import", str(base), str(folder.with_name("out")), *words])
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_groups_of_mxfp4_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["import", str(tmp_path / "nowhere"), str(tmp_path / "out"), "--storage", "mxfp4", "--group", "64"]
    with pytest.raises(SystemExit):
        cli.main(words)
    assert "--group = 64: groups of mxfp4 are of 32" in capsys.readouterr().err
    with pytest.raises(MoextendError, match="expert_group = 64: groups of mxfp4 are of 32"):
        tiny.run_settings(expert_storage="mxfp4", expert_group=64)


@pytest.mark.parametrize("suffix", ["", "_scale"])
def test_a_damaged_tensor_in_few_bits_is_named(suffix: str, imported):
    _, bring_in = imported
    folder = bring_in("few", "--storage", "int4", "--group", "8")
    path = quantising.MATRICES[1] + suffix
    file, header = folder / "model.safetensors", folder.joinpath("model.safetensors").read_bytes()
    size = int.from_bytes(header[:8], "little")
    first = json.loads(header[8 : 8 + size])[path]["data_offsets"][0]
    data = bytearray(header)
    data[8 + size + first + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(MoextendError, match=f"{path} is not what was imported"):
        hashes.base_hashes(open_source(folder).leaves)


# --- trained over -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(KINDS, "mxfp4"))
def test_a_new_expert_computes_what_its_source_does(kind: Any):
    arrays = arrays_of(kind)
    grown = grow(read_by_grow(arrays), config=config_of(kind), recipe=RECIPES["paper"], seed=0)
    plain = as_plain(arrays)
    for name in ("w_gate", "w_up", "w_down"):
        whole = plain[f"{quantising.EXPERTS}{name}"]
        for y, (layer, source) in enumerate(zip(tiny.EXTENSION.layers, tiny.EXTENSION.sources, strict=True)):
            np.testing.assert_array_equal(grown[f"extensions/image/new_experts/{name}"][y, 0], whole[layer, source])


def test_integers_without_their_scales_are_no_weights():
    arrays = {path: leaf for path, leaf in arrays_of("int8").items() if not path.endswith("_scale")}
    with pytest.raises(KeyError, match="w_gate_scale"):
        grow(arrays, config=config_of("int8"), recipe=RECIPES["paper"], seed=0)


@pytest.mark.slow
def test_a_run_over_experts_in_four_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All stages; text is exactly the quantised base's, the base stays as it was, and what is exported says so."""
    base, llava = tiny.write_base(tmp_path / "base"), tiny.write_llava(tmp_path / "llava", rows=24)
    stage = StageSettings(data=str(llava / "llava_v1_5_mix665k.json"), steps=2, batch_size=8, length=0,
                          images_per_row=0, loss_chunk=64, split="train[:16]")  # fmt: skip
    evaluate = EvaluateSettings(data=stage.data, questions=8, split="train[16:]", batch_size=8, length=0,
                                max_new_tokens=3, text_length=64, text_batch_size=8)  # fmt: skip
    settings = RunSettings(
        align=stage, extend=stage, finetune=stage, full=stage, evaluate=evaluate,
        select=SelectSettings(held_out=6, share=0.5, batch_size=6), base=str(base), vision=str(base / "vision"),
        dtype="float32", text_isolation="strict", expert_storage="int4", expert_group=GROUP, log_every=1,
    )  # fmt: skip
    record = whole_run(settings, tmp_path / "w")
    assert record["frozen_unchanged"]
    assert {of["moextend"] - of["base"] for of in record["text_loss"].values()} == {0.0}
    grown = train_state.load_leaves(tmp_path / "w" / "grow" / "result", facts={})
    assert grown is not None
    for name in ("w_gate", "w_up", "w_down"):  # the weights that integers stand for, not these
        assert 0 < np.abs(np.asarray(grown[f"extensions/image/new_experts/{name}"], np.float32)).max() < 1
    with pytest.raises(MoextendError, match="expert_group"):
        whole_run(dataclasses.replace(settings, expert_group=4, finetune=dataclasses.replace(stage, steps=3)),
                  tmp_path / "w")  # fmt: skip
    cli.call(["export", str(tmp_path / "w"), str(tmp_path / "delta"), "--layout", "delta"])
    cli.call(["export", str(tmp_path / "w"), str(tmp_path / "hf"), "--layout", "hf"])
    folders.assert_same(
        {name: leaf for name, leaf in folders.read(base).items() if ".experts." in name},
        {
            name.removeprefix("language_model."): leaf
            for name, leaf in folders.read(tmp_path / "hf").items() if ".experts." in name
        },
    )  # fmt: skip
    capsys.readouterr()
    words = ["generate", "--checkpoint", str(tmp_path / "delta"), "--base", str(base), "--max_new_tokens", "1", "a"]
    assert cli.call(words) in (0, None)
    assert f"experts in int4 in groups of {GROUP}; here they are as their files have them" in capsys.readouterr().err
    # Served as it was trained it is the same model, and nothing is said.
    trained = open_place(Place(workdir=tmp_path / "w"))
    served = open_place(Place(checkpoint=tmp_path / "delta", base=base, vision=base / "vision"), settings=settings)
    assert "was trained over" not in capsys.readouterr().err
    assert served.arrays.keys() == trained.arrays.keys() and served.config.quantised == trained.config.quantised
    for path, leaf in trained.arrays.items():
        np.testing.assert_array_equal(np.asarray(served.arrays[path]), np.asarray(leaf), err_msg=path)


def test_full_fine_tuning_is_refused_before_anything_is_read():
    with pytest.raises(MoextendError, match="expert_storage int8: full fine-tuning trains the pretrained experts"):
        tiny.run_settings(expert_storage="int8", baseline=True)


def test_integers_do_not_train():
    with pytest.raises(MoextendError, match="stored in few bits|stored as integers .* set expert_storage=as_is"):
        stages.split(arrays_of("int8"), ["decoder/*"])
