"""Tiny models of other families, made by transformers: every array of a forward pass, gradients, generation, files.

    MOEXTEND_FAMILIES=FOLDER pytest tests/parity

In: a folder in the layout of ../shared/families; else that folder. Families that are not in the table are skipped.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import einops
import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import few

from moextend_jax import cli
from moextend_jax.checkpoints import mxfp4, names
from moextend_jax.checkpoints.leaves import read_slice
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.compare.reference import Reference, rows_of, to_batch
from moextend_jax.config import IGNORE, RECIPES, Batch, ModelConfig, Quantised
from moextend_jax.families import FAMILIES
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend, abstract
from moextend_jax.models.quantised import dequantise
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import losses
from parity import sets

NAMED = os.environ.get("MOEXTEND_FAMILIES", "")
FOLDER = Path(NAMED) if NAMED else Path(__file__).parents[3] / "shared" / "families"
FORWARDS = [path.parent.relative_to(FOLDER) for path in sorted(FOLDER.glob("**/forward.npz"))] or [None]
TOWERS = [path.parent.relative_to(FOLDER) for path in sorted(FOLDER.glob("**/siglip.npz"))] or [None]
WHOLE = [path.parent.relative_to(FOLDER) for path in sorted(FOLDER.glob("*/generate.npz"))] or [None]
FAST = [name for name in WHOLE if name and name.parts[0] == "gpt_oss"]
"""Sinks, windows and biases: the one that differs most."""
PACKED = [path.parent.relative_to(FOLDER) for path in sorted(FOLDER.glob("*/mxfp4/config.json"))] or [None]
EXAMPLES = [path.parent.relative_to(FOLDER) for path in sorted(FOLDER.glob("*/mxfp4_example.npz"))] or [None]
ATOL = 1e-4
CONFIGS = ("config.json", "config.transformers5.json")
"""One model in the spelling of published files, and in transformers 5's."""


class Loaded(NamedTuple):
    folder: Path
    structure: MoExtend
    arrays: dict[str, jax.Array]
    config: ModelConfig


def folder_of(name: Path | None, *, known: bool = False) -> Path:
    if NAMED and not FOLDER.is_dir():
        pytest.fail(f"MOEXTEND_FAMILIES: {FOLDER} is no folder of reference numbers")
    if name is None:
        pytest.skip(f"no reference values: {FOLDER} holds none")
    family = json.loads((FOLDER / name / "config.json").read_text())["model_type"]
    if family not in FAMILIES and not known:
        pytest.skip(f"family {family} is not supported")
    return FOLDER / name


def opened(name: Path | None) -> Loaded:
    folder = folder_of(name)
    found = open_checkpoint(folder, dtype="float32")
    return Loaded(folder, abstract(found.config), found.arrays, found.config)


@pytest.mark.parametrize("attributes", few(CONFIGS, CONFIGS[0]))
@pytest.mark.parametrize("name", FORWARDS, ids=str)
def test_every_array_of_a_forward_pass(name: Path | None, attributes: str, tmp_path: Path, capsys):
    """By the command that people use. A variant is another config.json over its parent's tensors."""
    folder = folder_of(name)
    parent = folder if (folder / "model.safetensors").is_file() else folder.parents[1]
    if not (folder / attributes).is_file():
        pytest.skip(f"{folder} holds no {attributes}")
    for file, beside in (("forward.npz", folder), ("batches.npz", parent), ("manifest.json", parent)):
        shutil.copy(beside / file, tmp_path / file)
    (tmp_path / "model").mkdir()
    shutil.copy(folder / attributes, tmp_path / "model" / "config.json")
    shutil.copy(parent / "model.safetensors", tmp_path / "model" / "model.safetensors")
    code = cli.call(
        ["compare", f"--checkpoint={tmp_path / 'model'}", f"--reference={tmp_path / 'forward.npz'}", "--all", "--json"]
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert code == 0
    assert {f"{row['batch']}/{row['quantity']}" for row in rows} == set(sets.arrays(folder, "forward"))
    assert {row["verdict"] for row in rows} == {"ok"}
    assert {row["agreement"] for row in rows if row["quantity"].startswith("topk_idx/")} <= {1.0}


@pytest.mark.parametrize("name", few(WHOLE, *FAST), ids=str)
def test_gradients_of_routers_and_of_what_a_projector_gives(name: Path | None):
    loaded = opened(name)
    folder, structure, arrays, config = loaded
    coefficient = json.loads((folder / "manifest.json").read_text())["spec"]["coef"]
    batch = _batch(folder, "train0")
    trained = {path: array for path, array in arrays.items() if path.endswith(("moe/gate", "moe/gate_bias"))}

    def total(trained, more_BLD):
        model, factor = with_arrays(structure, {**arrays, **trained}), config.decoder.embed_factor
        with pytest.MonkeyPatch.context() as patch:
            plain = MoExtend.embed
            patch.setattr(MoExtend, "embed", lambda self, batch: plain(self, batch) + factor * more_BLD)
            return losses(model, batch, recipe=RECIPES["released"], aux_coefficient=coefficient, chunk=7)[0].total

    none_BLD = jnp.zeros((*batch.ids_BL.shape, config.decoder.width))
    gradient, of_embeddings_BLD = jax.jit(jax.grad(total, argnums=(0, 1)))(trained, none_BLD)
    theirs = sets.arrays(folder, "embeds_grad")["text/embeds_grad"]
    np.testing.assert_allclose(of_embeddings_BLD, theirs, atol=ATOL, rtol=0)
    stage = {key.removeprefix("grad/"): array for key, array in sets.arrays(folder, "stage_extend").items()}
    tensors = [t for t in names.tensors(config.decoder.family, config) if t.path in trained]
    assert {tensor.file for tensor in tensors} == set(stage)
    for tensor in tensors:
        value = einops.rearrange(stage[tensor.file], tensor.layout)
        np.testing.assert_allclose(gradient[tensor.path][tensor.index], value, atol=ATOL, rtol=0, err_msg=tensor.file)


@pytest.mark.parametrize("name", few(WHOLE, *FAST), ids=str)
def test_greedy_tokens_and_the_logits_that_chose_them(name: Path | None):
    loaded = opened(name)
    theirs = sets.arrays(loaded.folder, "generate")
    prompt, written = theirs["prompt"], theirs["tokens_cache"]
    np.testing.assert_array_equal(theirs["tokens_nocache"], written)
    new = written.shape[1] - prompt.shape[1]
    generator = Generator(loaded.structure, eos=-1)
    completed = tiny.complete(generator, loaded.arrays, _of_ids(prompt), max_new_tokens=new)
    np.testing.assert_array_equal(np.concatenate([prompt, completed], axis=1), written)
    if "logits_last" in theirs:
        model = with_arrays(loaded.structure, loaded.arrays)
        logits_BLV = model.decoder.logits(model(_of_ids(written)).hidden_BLD)[:, prompt.shape[1] - 1 : -1]
        np.testing.assert_allclose(logits_BLV, theirs["logits_last"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", WHOLE, ids=str)
def test_import_and_export_give_the_files_back(name: Path | None, tmp_path: Path, capsys):
    loaded = opened(name)
    cli.call(["import", str(loaded.folder), str(tmp_path / "imported")])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    folders.assert_same(folders.read(tmp_path / "out"), folders.read(loaded.folder))
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", loaded.folder))
    assert ours == theirs


@pytest.mark.parametrize("name", PACKED, ids=str)
def test_four_bits_are_read_as_the_weights_that_they_stand_for(name: Path | None, tmp_path: Path):
    folder = folder_of(name)
    packed, plain = open_checkpoint(folder), open_checkpoint(folder.parent)
    assert {path.rpartition("/")[2] for path in packed.arrays if "experts/w_" in path} == {"w_gate", "w_up", "w_down"}
    assert packed.arrays.keys() == plain.arrays.keys()
    for path, array in plain.arrays.items():
        np.testing.assert_array_equal(packed.arrays[path], array, err_msg=path)
    cli.call(["import", str(folder), str(tmp_path / "imported")])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    folders.assert_same(folders.read(tmp_path / "out"), folders.read(folder.parent))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("name", PACKED, ids=str)
def test_and_can_stay_in_four_bits(name: Path | None):
    """Quantised anew they are other integers, perhaps, and exactly the same weights."""
    folder = folder_of(name)
    packed, plain = open_checkpoint(folder, storage=Quantised("mxfp4", 32)), open_checkpoint(folder)
    integers = [path for path in packed.arrays if f"{path}_scale" in packed.arrays]
    assert len(integers) == 3 and all(packed.arrays[path].dtype == jnp.int4 for path in integers)
    for path in integers:
        weights = dequantise(packed.arrays[path], packed.arrays[f"{path}_scale"], jnp.bfloat16)
        np.testing.assert_array_equal(weights, plain.arrays[path], err_msg=path)


@pytest.mark.parametrize("name", EXAMPLES, ids=str)
def test_several_blocks_to_a_row(name: Path | None):
    folder = folder_of(name)
    example = sets.arrays(folder, "mxfp4_example")
    ours = np.swapaxes(mxfp4.unpack(example["blocks"], example["scales"]), -1, -2)
    np.testing.assert_array_equal(ours.astype(np.float32), example["weights"])


@pytest.mark.parametrize("attributes", CONFIGS)
@pytest.mark.parametrize("name", TOWERS, ids=str)
def test_every_state_of_a_picture_tower_that_was_imported(name: Path | None, attributes: str, tmp_path: Path):
    """By the command that people use; what it exports are the bytes that came in."""
    original, folder = folder_of(name, known=True), tmp_path / "theirs"
    if not (original / attributes).is_file():
        pytest.skip(f"{original} holds no {attributes}")
    folder.mkdir()
    for file in ("model.safetensors", "preprocessor_config.json", "siglip.npz"):
        if (original / file).is_file():
            shutil.copyfile(original / file, folder / file)
    shutil.copyfile(original / attributes, folder / "config.json")
    cli.call(["import", str(folder), str(tmp_path / "imported")])
    source = open_source(tmp_path / "imported")
    assert source.parts == {"vision"} and source.config.vision
    whole = {path: read_slice(leaf, (slice(None),) * len(leaf.shape)) for path, leaf in source.leaves.items()}
    arrays = {path.removeprefix("media/image/tower/"): jnp.asarray(array) for path, array in whole.items()}
    shapes: Any = abstract(source.config).media["image"].tower
    tower = with_arrays(shapes, arrays)
    theirs = dict(sets.arrays(folder, "siglip"))  # which others read too
    images_nhwc = jnp.asarray(theirs.pop("pixel_values").transpose(0, 2, 3, 1))
    assert images_nhwc.shape[1:] == (source.config.vision.image_size, source.config.vision.image_size, 3)
    del theirs["pooler_output"]  # of the head, which no projector reads
    states = [tower.hidden_state(images_nhwc, layer=layer) for layer in range(source.config.vision.layers + 1)]
    ours = {f"hidden_states/{layer}": state for layer, state in enumerate(states)}
    ours |= {"patch_m1": states[-1], "patch_m2": tower(images_nhwc), "last_hidden_state": tower.post_norm(states[-1])}
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, atol=ATOL, rtol=0, err_msg=key)
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    out, file = folders.read(tmp_path / "out"), folders.read(folder)
    assert out.keys() == {key for key in file if key.startswith("vision_model.") and ".head." not in key}
    folders.assert_same(out, {key: file[key] for key in out})


def _batch(folder: Path, name: str) -> Batch:
    holder = Reference(folder / "batches.npz", {}, {"batches": sets.arrays(folder, "batches"), "images": {}}, {})
    return jax.tree.map(jnp.asarray, to_batch(rows_of(holder, name, start=None), start=None, patches=0, room=0))


def _of_ids(ids_BL: np.ndarray) -> Batch:
    ids_BL = ids_BL.astype(np.int32)
    positions_BL = np.broadcast_to(np.arange(ids_BL.shape[1], dtype=np.int32), ids_BL.shape)
    arrays = ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, np.ones_like(ids_BL), np.full_like(ids_BL, -1)
    return jax.tree.map(jnp.asarray, Batch(*arrays))
