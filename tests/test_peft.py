"""PEFT's files of LoRA: out and in again bit for bit, as transformers 4 and 5 have them, and refusals in words."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import folders
import numpy as np
import orbax.checkpoint as ocp
import pytest
import random_run
import tiny
from safetensors.numpy import load_file, save_file

from moextend_jax import cli
from moextend_jax.checkpoints import peft
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.tensors import Stored, open_tensors
from moextend_jax.config import AdapterConfig, MoextendError, Named
from moextend_jax.mesh import make_mesh
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.models_of import open_model
from moextend_jax.runs.run import remember
from moextend_jax.settings import MESH, MethodSettings

LORA = MethodSettings(name="lora", rank=3, alpha=6.0, experts="per_expert", router=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run.random_run(tmp_path_factory.mktemp("lora"), method=LORA)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "peft"
    cli.main(["export", str(run.workdir), str(folder), "--layout", "peft"])
    return folder


def opened(folder: Path, run: Any):
    return open_checkpoint(folder, base=Path(run.settings.base), mesh=make_mesh(MESH))


def test_out_and_in_again(exported: Path, run):
    tensors = load_file(exported / peft.TENSORS)
    decoder, layers = run.config.decoder, range(run.config.decoder.layers)
    assert len(tensors) == 2 * len(layers) * (4 + 1 + 3 * decoder.experts)
    name = "base_model.model.model.layers.1.block_sparse_moe.experts.2.w2.lora_"
    assert tensors[name + "A.weight"].shape == (3, decoder.hidden)
    model = open_model(run, "moextend")
    w_down = "adapters/image/block/down"
    np.testing.assert_array_equal(tensors[name + "A.weight"], np.asarray(model.arrays[f"{w_down}/a"])[1, 2].T)
    attributes = json.loads((exported / peft.CONFIG).read_text())
    assert (attributes["r"], attributes["lora_alpha"]) == (3, 6.0)
    assert {*attributes["target_modules"]} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3"}
    again = opened(exported, run)
    assert again.config.adapters["lora"] == dataclasses.replace(model.model.config.adapters["image"], medium="")
    for path, leaf in again.arrays.items():
        if path.startswith("adapters/"):
            np.testing.assert_array_equal(leaf, model.arrays[path.replace("lora", "image")], err_msg=path)


def test_every_leaf_is_read_once_on_the_way_out(exported: Path, run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A and B of a map are written in turn."""
    restore, read = ocp.Checkpointer.restore, []

    def noted(self, *args, **kwargs):
        asked = [of for of in (*args, *kwargs.values()) if isinstance(of, ocp.args.PyTreeRestore)]
        read.extend(path for of in asked for path in of.item or ())
        return restore(self, *args, **kwargs)

    monkeypatch.setattr(ocp.Checkpointer, "restore", noted)
    cli.main(["export", str(run.workdir), str(tmp_path / "again"), "--layout", "peft"])
    assert len(read) == len(set(read)) == 2 * (4 + 1 + 3)
    assert (tmp_path / "again" / peft.TENSORS).read_bytes() == (exported / peft.TENSORS).read_bytes()


def test_of_a_layer_its_own_tensors_are_read_and_no_others(exported: Path, run, monkeypatch: pytest.MonkeyPatch):
    names: list[str] = []

    def watched(path: Path) -> dict[str, Stored]:
        def one(name: str, tensor: Stored) -> Stored:
            return tensor._replace(read=lambda: names.append(name) or tensor.read())

        return {name: one(name, tensor) for name, tensor in open_tensors(path).items()}

    monkeypatch.setattr(peft, "open_tensors", watched)
    leaf = peft.open_peft(exported, run.config.decoder).leaves["adapters/lora/block/down/a"]
    assert leaf.ours((1,)).shape == leaf.shape[1:]
    assert len(names) == run.config.decoder.experts and all(".layers.1." in name for name in names)


def test_what_peft_does_to_text_that_is_isolated_here_is_printed(run, tmp_path: Path, capsys):
    cli.main(["export", str(run.workdir), str(tmp_path / "open"), "--layout", "peft"])
    assert "text_isolation" not in capsys.readouterr().out
    strict = dataclasses.replace(run, settings=dataclasses.replace(run.settings, text_isolation="strict"))
    remember(dataclasses.replace(strict, workdir=shutil.copytree(run.workdir, tmp_path / "strict")))
    cli.main(["export", str(tmp_path / "strict"), str(tmp_path / "out"), "--layout", "peft"])
    assert "PEFT applies it to all text" in capsys.readouterr().out


@pytest.mark.slow
def test_factors_that_all_experts_share_are_written_for_each(tmp_path: Path):
    """What comes back has as many sets as experts, and computes the same."""
    run = random_run.random_run(tmp_path, method=dataclasses.replace(LORA, experts="shared"))
    cli.main(["export", str(run.workdir), str(tmp_path / "peft"), "--layout", "peft"])
    again, model = opened(tmp_path / "peft", run), open_model(run, "moextend")
    text = tiny.batch()._replace(features={})
    text = text._replace(places_BL=np.full_like(text.places_BL, -1))
    hidden = [np.asarray(with_arrays(tiny.structure(config), arrays)(text).hidden_BLD)
              for config, arrays in ((again.config, again.arrays), (model.model.config, model.arrays))]  # fmt: skip
    np.testing.assert_allclose(hidden[0], hidden[1], atol=1e-5)


def test_what_peft_writes_of_fused_experts(exported: Path, run, tmp_path: Path):
    """`target_parameters` of transformers 5: rows (E r), columns (r E), gate and up with one A; a router in mlp."""
    tensors, fused = load_file(exported / peft.TENSORS), {}
    decoder = run.config.decoder
    E, start = decoder.experts, "base_model.model.model.layers."
    for layer in range(decoder.layers):
        old, new = f"{start}{layer}.block_sparse_moe.", f"{start}{layer}.mlp."

        def of(w: str, factor: str, old: str = old) -> np.ndarray:
            return np.stack([tensors[f"{old}experts.{e}.{w}.lora_{factor}.weight"] for e in range(E)])

        # up gets gate's A
        gate_up = np.concatenate([of("w1", "B"), of("w3", "B")], axis=1)
        for stem, a, b in (("experts.base_layer", of("w1", "A"), gate_up), ("experts", of("w2", "A"), of("w2", "B"))):
            fused[f"{new}{stem}.lora_A.weight"] = np.concatenate(a)
            fused[f"{new}{stem}.lora_B.weight"] = np.moveaxis(b, 0, -1).reshape(b.shape[1], -1)
        for factor in "AB":
            fused[f"{new}gate.lora_{factor}.weight"] = tensors[f"{old}gate.lora_{factor}.weight"]
    fused |= {name: tensor for name, tensor in tensors.items() if "self_attn" in name}
    shutil.copytree(exported, tmp_path / "fused")
    save_file({n: np.ascontiguousarray(t) for n, t in fused.items()}, tmp_path / "fused" / peft.TENSORS)
    ours, theirs = opened(exported, run).arrays, opened(tmp_path / "fused", run).arrays
    for path in (path for path in ours if path.startswith("adapters/")):
        expected = ours["adapters/lora/block/gate/a" if path.endswith("up/a") else path]
        np.testing.assert_array_equal(theirs[path], expected, err_msg=path)


def test_maps_and_layers_that_are_left_alone_have_zeros(exported: Path, run, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "some")
    kept = {n: t for n, t in load_file(exported / peft.TENSORS).items() if "layers.1.self_attn.q_proj" in n}
    save_file(kept, tmp_path / "some" / peft.TENSORS)
    model = opened(tmp_path / "some", run)
    assert model.config.adapters["lora"].experts == "none" and not model.config.adapters["lora"].router
    b_ZrNH = np.asarray(model.arrays["adapters/lora/attention/query/b"])
    assert b_ZrNH[1].any() and not b_ZrNH[[0, 2]].any()
    assert not np.asarray(model.arrays["adapters/lora/attention/key/b"]).any()
    assert "11 maps without an update" in " ".join(model.source.notes)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("use_dora", True, "use_dora = True is not read"),
        ("peft_type", "IA3", "peft_type = 'IA3' is not read"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern"),
        ("modules_to_save", ["lm_head"], "modules_to_save"),
        ("r", "3", "no rank and alpha"),
        ("init_lora_weights", "pissa", "init_lora_weights = 'pissa' is not read"),
        ("use_rslora", "false", "use_rslora = 'false' is not read"),
        ("r", True, "no rank and alpha"),
        ("lora_alpha", float("inf"), "no rank and alpha"),
        ("lora_alpha", float("nan"), "no rank and alpha"),
        ("r", 5, "expected"),
    ],
)
def test_settings_that_compute_something_else_are_refused(setting, value, message, exported: Path, run, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "other")
    attributes = json.loads((exported / peft.CONFIG).read_text())
    (tmp_path / "other" / peft.CONFIG).write_text(json.dumps(attributes | {setting: value}))
    with pytest.raises(MoextendError, match=message):
        opened(tmp_path / "other", run)


def test_rslora_is_lora_with_another_alpha(exported: Path, run, tmp_path: Path):
    shutil.copytree(exported, tmp_path / "rs")
    attributes = json.loads((exported / peft.CONFIG).read_text())
    (tmp_path / "rs" / peft.CONFIG).write_text(json.dumps(attributes | {"use_rslora": True}))
    assert opened(tmp_path / "rs", run).config.adapters["lora"].scale == pytest.approx(6 / 3**0.5)


def test_a_share_is_written_as_part_of_alpha(run, tmp_path: Path):
    part = AdapterConfig(rank=3, alpha=6.0, share=0.5, experts="per_expert")
    leaves = folders.source_of(dataclasses.replace(run.config, adapters=Named({"half": part}))).leaves
    own = {
        path.removeprefix("adapters/half/"): leaf for path, leaf in leaves.items() if path.startswith("adapters/half/")
    }
    assert peft.planned(own, part, run.config.decoder)[1]["lora_alpha"] == 3.0


def test_tensors_that_do_not_belong_and_a_missing_base(exported: Path, run, tmp_path: Path):
    with pytest.raises(MoextendError, match="name the base that it was trained on with --base DIR"):
        open_checkpoint(exported)
    tensors = load_file(exported / peft.TENSORS)
    for n, (change, message) in enumerate((
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 16), np.float32)}, "lm_head.* belong to no map"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": None}, "lacks .*q_proj.lora_B.weight"),
    )):  # fmt: skip
        shutil.copytree(exported, tmp_path / str(n))
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, tmp_path / str(n) / peft.TENSORS)
        with pytest.raises(MoextendError, match=message):
            opened(tmp_path / str(n), run)


def test_what_is_no_lora_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = random_run.random_run(tmp_path, method=MethodSettings(name="mole", rank=2))
    with pytest.raises(SystemExit):
        cli.main(["export", str(run.workdir), str(tmp_path / "out"), "--layout", "peft"])
    assert "layout peft holds LoRA; mole has no place in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
