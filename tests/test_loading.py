"""Every kind of checkpoint folder opens as the same arrays; what does not fit together is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folders
import numpy as np
import oracle
import pytest
import tiny
import tiny_llama

from moextend_jax import cli, distributed
from moextend_jax.checkpoints import compose, convert, hashes, huggingface, leaves
from moextend_jax.checkpoints.loading import EMBEDDED, folder_of, open_base, open_checkpoint, open_tower
from moextend_jax.checkpoints.source import Source, open_source
from moextend_jax.checkpoints.upcycle import open_upcycled
from moextend_jax.config import (
    ImageTags,
    Medium,
    MoextendError,
    Named,
    ProjectorConfig,
    VisionConfig,
    with_extension,
)
from moextend_jax.mesh import make_mesh
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.media import with_media
from moextend_jax.runs.run import tokenizer_of_base
from moextend_jax.settings import MediumSettings
from moextend_jax.sharding import MESH_AXES

TRAINED = {"align": "media/image/projector/", "extend": "decoder/layers/moe/gate$", "finetune": "extensions/image/"}


def sizes(config):
    """A configuration without what depends on how it is run, or is not in files."""
    extension = config.extension and dataclasses.replace(config.extension, sources=())
    return dataclasses.replace(with_extension(config, extension), dtype="", train_dtype="", remat="none")


def test_a_mixtral(tmp_path: Path):
    opened = open_checkpoint(folders.mixtral(tmp_path, shards=3))
    folders.assert_same(opened.arrays, folders.arrays(folders.TEXT))
    assert (opened.source.record.layout, opened.config.dtype) == ("mixtral", "bfloat16")
    assert sizes(opened.config) == sizes(folders.TEXT)


def test_a_tower_without_projector_is_left_out_of_a_model_that_runs(tmp_path: Path):
    folders.clip(folders.mixtral(tmp_path) / "vision")
    assert open_source(tmp_path).parts == {"decoder", "vision"}
    opened = open_checkpoint(tmp_path, dtype="float32")
    assert opened.config.vision is None and opened.config.dtype == "float32"
    with_arrays(tiny.structure(opened.config), opened.arrays)


@pytest.mark.parametrize("config", [folders.RELEASED, folders.ALIGNED], ids=["extended", "aligned"])
@pytest.mark.parametrize("sizes_from", ["config", "folder", "subfolder"])
def test_a_released_checkpoint(tmp_path: Path, config, sizes_from: str):
    folder = folders.released(tmp_path / "released", config=config, tower=sizes_from == "config")
    vision = None
    if sizes_from == "folder":
        vision = tmp_path / "tower"
    if sizes_from != "config":
        where = vision or folder / "vision"
        where.mkdir()
        (where / "config.json").write_text(json.dumps(tiny.clip_attributes(tiny.VISION)))
    opened = open_checkpoint(folder, vision=vision)
    folders.assert_same(opened.arrays, folders.arrays(config))
    assert sizes(opened.config) == sizes(config) and opened.config.tags == config.tags
    with_arrays(tiny.structure(opened.config), opened.arrays)  # a model that can run


def test_a_tower_of_unknown_sizes_says_which_option_to_give(tmp_path: Path):
    with pytest.raises(MoextendError, match="--vision DIR"):
        open_checkpoint(folders.released(tmp_path, tower=False))


@pytest.mark.parametrize("stage", TRAINED)
@pytest.mark.parametrize("config_json", [True, False])
def test_a_partial_save_over_its_base(tmp_path: Path, stage: str, config_json: bool):
    """Each stage's tensors alone, from another seed, over a Mixtral, a tower and a projector."""
    config = folders.RELEASED if stage == "finetune" else folders.ALIGNED
    folder = folders.released(tmp_path / "partial", config=config, seed=1, keep=TRAINED[stage], tower=False)
    if not config_json:
        (folder / "config.json").unlink()
    base = folders.released(tmp_path / "base", config=folders.ALIGNED)
    opened = open_checkpoint(folder, base=base)
    trained = {p: leaf for p, leaf in folders.arrays(config, seed=1).items() if re.match(TRAINED[stage], p)}
    assert trained
    folders.assert_same(opened.arrays, folders.arrays(folders.ALIGNED) | trained)
    assert opened.source.record.layout == "released" and opened.config.tags == config.tags

    if stage == "align":  # here the base may come in its parts
        mixtral, clip = folders.mixtral(tmp_path / "mixtral"), folders.clip(tmp_path / "clip")
        folders.assert_same(open_checkpoint(folder, base=mixtral, vision=clip).arrays, opened.arrays)


@pytest.mark.parametrize("prefix", ["mm_projector.", "model.mm_projector."])
def test_a_partial_save_of_a_projector_may_be_spelled_as_llava_does(tmp_path: Path, prefix: str):
    folder = folders.projector(tmp_path / "partial", prefix=prefix.removesuffix("mm_projector."))
    base = folders.mixtral(tmp_path / "mixtral")
    opened = open_checkpoint(folder, base=base, vision=folders.clip(tmp_path / "clip"))
    folders.assert_same(opened.arrays, folders.arrays(tiny.PLAIN))


def test_an_imported_folder_is_the_same_checkpoint(tmp_path: Path):
    opened = open_checkpoint(folders.released(tmp_path / "released"))
    convert.import_source(open_source(tmp_path / "released"), tmp_path / "imported")
    again = open_checkpoint(tmp_path / "imported")
    folders.assert_same(again.arrays, opened.arrays)
    assert again.config == opened.config and folders.base_hash(again) == folders.base_hash(opened)


def test_the_embedded_base_opens():
    opened = open_source(EMBEDDED)
    assert opened.parts == {"decoder", "vision"} and set(opened.files) >= {"tokenizer.model"}


@oracle.needs_oracle
@pytest.mark.parametrize("name", oracle.MODELS)
def test_the_released_checkpoints(name: str):
    opened, expected = open_checkpoint(oracle.FOLDER / name, vision=oracle.FOLDER / "clip"), oracle.load(name)
    assert dataclasses.replace(opened.config, remat="none") == expected.config
    folders.assert_same(opened.arrays, expected.arrays)


# --- the content hash -------------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_is_stored_however_it_is_stored_and_run(tmp_path: Path):
    one = folders.base_hash(open_checkpoint(folders.mixtral(tmp_path / "one")))
    assert folders.base_hash(open_checkpoint(folders.mixtral(tmp_path / "shards", shards=4))) == one
    assert folders.base_hash(open_checkpoint(tmp_path / "one", dtype="float32")) == one
    convert.import_source(open_source(tmp_path / "one"), tmp_path / "imported")
    assert folders.base_hash(open_checkpoint(tmp_path / "imported")) == one
    assert json.loads((tmp_path / "imported" / "moextend.json").read_text())["base_hash"] == one
    assert folders.base_hash(open_checkpoint(folders.mixtral(tmp_path / "other", seed=1))) != one
    assert folders.base_hash(open_checkpoint(folders.mixtral(tmp_path / "f32", dtype=np.float32))) != one
    folders.change(tmp_path / "one", {"model.norm.weight": lambda old: np.nextafter(old, np.ones_like(old) * 9)})
    assert folders.base_hash(open_checkpoint(tmp_path / "one")) != one


def test_a_tensor_moved_to_another_place_changes_the_hash(tmp_path: Path):
    before = hashes.base_hashes(open_source(folders.mixtral(tmp_path)).leaves).base
    old = folders.read(tmp_path)
    one, other = (f"model.layers.{n}.input_layernorm.weight" for n in (0, 1))
    folders.change(tmp_path, {one: lambda _: old[other], other: lambda _: old[one]})
    assert hashes.base_hashes(open_source(tmp_path).leaves).base != before


# --- sharded reading --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("mesh", [(1, 2, 2, 2), (2, 1, 4, 1), (8, 1, 1, 1), (1, 8, 1, 1)])
def test_arrays_spread_over_devices_are_the_same(tmp_path: Path, mesh: tuple[int, ...]):
    even = dataclasses.replace(folders.TEXT, decoder=dataclasses.replace(tiny.DECODER, vocab_size=64))
    folder = folders.mixtral(tmp_path, config=even)
    config: dict[str, int] = dict(zip(MESH_AXES, mesh, strict=True))
    whole, spread = open_checkpoint(folder), open_checkpoint(folder, mesh=make_mesh(config), dtype="float32")
    for path, array in spread.arrays.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(whole.arrays[path]).astype(np.float32), path)
    experts = spread.arrays["decoder/layers/moe/experts/w_gate"]
    split = mesh[1] * mesh[2] * mesh[3]
    assert experts.addressable_shards[0].data.size == experts.size // split
    assert len({shard.device for shard in experts.addressable_shards}) == 8


def test_only_the_pieces_of_a_slice_are_read(tmp_path: Path):
    leaf = open_source(folders.mixtral(tmp_path)).leaves["decoder/layers/moe/experts/w_down"]
    asked = []
    watched = leaf._replace(part=lambda index, slices: asked.append(index) or leaf.part(index, slices))
    part = (slice(1, 2), slice(2, 4), slice(None), slice(3, 9))
    made = leaves.read_slice(watched, part, dtype="float32")
    assert asked == [(1, 2), (1, 3)]
    expected = folders.arrays(folders.TEXT)["decoder/layers/moe/experts/w_down"][part]
    np.testing.assert_array_equal(made, expected.astype(np.float32))


def test_big_transpositions_are_exact():
    """Above a megabyte they are copied in strips."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 2**16, (700, 1100)).astype(np.uint16).view(folders.HALF)
    for view in (
        array.T,
        array.reshape(7, 100, 1100).transpose(2, 0, 1),
        array.reshape(700, 11, 100).transpose(1, 2, 0),
    ):
        assert leaves.contiguous(view, array.dtype).tobytes() == view.tobytes()
        made = leaves.contiguous(view, np.float32)
        np.testing.assert_array_equal(made, view.astype(np.float32))


# --- what does not fit together ---------------------------------------------------------------------------------------

GATE = "model.layers.2.block_sparse_moe.gate_vision.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
NORM = "model.layers.1.input_layernorm.weight"


def test_a_partial_save_needs_its_base(tmp_path: Path):
    folder = folders.released(tmp_path, keep="extensions/image/")
    with pytest.raises(MoextendError, match=r"Missing: lm_head.weight.*A partial save needs its base: --base DIR"):
        open_source(folder)


def test_tensors_of_other_names_are_no_partial_save(tmp_path: Path):
    folder = folders.change(folders.mixtral(tmp_path), {EXPERT: None, "model.layers.1.mlp.experts.down_proj": np.copy})
    with pytest.raises(MoextendError, match=r"Not asked for: model\.layers\.1\.mlp\.experts\.down_proj\.$"):
        open_source(folder)


def test_half_a_leaf_is_never_completed_from_the_base(tmp_path: Path):
    folder = folders.released(tmp_path / "partial", keep="decoder/layers/moe/gate$", config=folders.ALIGNED)
    folders.change(folder, {"model.layers.1.block_sparse_moe.gate.weight": None})
    with pytest.raises(MoextendError, match=r"Missing: model\.layers\.1\.block_sparse_moe\.gate\.weight"):
        open_source(folder, base=folders.released(tmp_path / "base", config=folders.ALIGNED))


def test_an_extension_of_layers_that_the_base_does_not_have(tmp_path: Path):
    small = dataclasses.replace(folders.TEXT, decoder=dataclasses.replace(tiny.DECODER, layers=2))
    folder = folders.released(tmp_path / "partial", keep="extensions/image/")
    base = folders.clip(folders.mixtral(tmp_path / "base", config=small) / "vision").parent
    with pytest.raises(MoextendError, match=rf"extends layers \[2\], but {base} has only 2 layers"):
        open_source(folder, base=base)


def test_a_base_of_other_sizes_names_them(tmp_path: Path):
    wide = dataclasses.replace(folders.TEXT, decoder=dataclasses.replace(tiny.DECODER, hidden=48))
    folder = folders.released(tmp_path / "partial", keep="extensions/image/")
    with pytest.raises(MoextendError, match="hidden is 40 and 48"):
        open_source(folder, base=folders.mixtral(tmp_path / "base", config=wide))


def test_layers_of_the_files_and_of_config_json_must_agree(tmp_path: Path):
    folder = folders.released(tmp_path)
    attributes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(attributes | {"add_layer": [0, 1]}))
    with pytest.raises(
        MoextendError, match=r"add_layer is \[0, 1\], but the files hold new experts in layers \[0, 2\]"
    ):
        open_source(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({EXPERT: lambda old: old[:-1]}, rf"{EXPERT} has shape \[39, 24\], expected \[40, 24\]"),
        ({EXPERT: np.ravel}, rf"{EXPERT} has shape \[960\], expected \[40, 24\]"),
        ({NORM: lambda old: old[:-1]}, rf"{NORM} has shape \[23\], expected \[24\]"),
        (
            {EXPERT: lambda old: old.astype(np.float16)},
            rf"{EXPERT} has element type float16, .* siblings have bfloat16",
        ),
        ({EXPERT: lambda old: old.astype(np.int8)}, rf"{EXPERT} has element type int8"),
        ({"lm_head.weight": lambda old: old.astype(np.float16)}, r"lm_head\.weight has .* float16, .* says bfloat16"),
        ({"lm_head.weight": lambda old: old.astype(np.float32)}, r"lm_head\.weight has .* float32, .* says bfloat16"),
        ({EXPERT: None, "model.odd": lambda old: old}, rf"Missing: {EXPERT}\. Not asked for: model\.odd\."),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, changes, said: str):
    with pytest.raises(MoextendError, match=said):
        open_source(folders.change(folders.mixtral(tmp_path), changes))


def test_one_tensor_of_a_tower_in_another_element_type_is_named(tmp_path: Path):
    name = "vision_model.pre_layrnorm.bias"
    folder = folders.change(folders.clip(tmp_path), {name: lambda old: old.astype(np.float32)})
    with pytest.raises(MoextendError, match=rf"{name} has element type float32, where the others have bfloat16"):
        open_source(folder)


def test_parts_alone_do_not_run(tmp_path: Path):
    with pytest.raises(MoextendError, match="holds no decoder, only vision"):
        open_checkpoint(folders.clip(tmp_path))


def test_a_projector_of_other_widths_is_refused(tmp_path: Path):
    folders.clip(folders.mixtral(tmp_path / "base") / "vision")
    path = folders.projector(tmp_path / "projector")
    assert open_source(tmp_path / "base", projector=path).parts == {"decoder", "vision", "projector"}
    tensors = {name: np.zeros([2 * n for n in value.shape], value.dtype) for name, value in folders.read(path).items()}
    folders.write(path, tensors, None)
    with pytest.raises(MoextendError, match="leads from width 24 to 48"):
        open_source(tmp_path / "base", projector=path)
    folders.mixtral(tmp_path / "text")
    with pytest.raises(MoextendError, match="needs a vision tower"):
        open_source(tmp_path / "text", projector=path)


def test_a_projector_may_be_imported_and_a_folder_without_one_is_refused(tmp_path: Path):
    folders.clip(folders.mixtral(tmp_path / "base") / "vision")
    path = folders.projector(tmp_path / "projector")
    for src, dst in ((path, tmp_path / "imported"), (tmp_path / "base", tmp_path / "whole")):
        convert.import_source(open_source(src), dst)
    opened, again = (open_source(tmp_path / "base", projector=one).leaves for one in (path, tmp_path / "imported"))
    assert opened.keys() == again.keys() and hashes.stored_hash(opened) == hashes.stored_hash(again)
    with pytest.raises(MoextendError, match="whole holds no projector, only decoder, vision"):
        open_source(tmp_path / "base", projector=tmp_path / "whole")


@pytest.mark.parametrize("kept", ["decoder/|extensions/|media/image/tower/", "decoder/|extensions/"])
def test_a_released_checkpoint_takes_a_projector_that_it_lacks(tmp_path: Path, kept: str):
    whole = open_source(folders.released(tmp_path / "whole"))
    folder = folders.released(tmp_path / "part", keep=kept)
    vision = None if "tower" in kept else folders.clip(tmp_path / "clip")
    path = folders.projector(tmp_path / "projector")
    opened = open_source(folder, vision=vision, projector=path)
    assert opened.config == whole.config and hashes.stored_hash(opened.leaves) == hashes.stored_hash(whole.leaves)
    with pytest.raises(MoextendError, match=r"Missing: model\.visual\.mm_projector\.0\.bias"):
        open_source(folder, vision=vision)
    with pytest.raises(MoextendError, match="whole has a projector already"):
        open_source(tmp_path / "whole", projector=path)


def seeing(*, projector: ProjectorConfig, tower: VisionConfig = tiny.VISION) -> Source:
    """A model whose pictures go through this projector."""
    sound = dataclasses.replace(tiny.SOUND, projector=ProjectorConfig())
    image = Medium(tower=tower, projector=projector)
    media = Named(image=image, sound=sound) if projector.trunk else Named(image=image)
    return folders.source_of(dataclasses.replace(tiny.PLAIN, media=media))


@pytest.mark.parametrize(
    "projector",
    [
        ProjectorConfig(kind="pool", neighbours=2),
        ProjectorConfig(kind="stack", neighbours=2),
        ProjectorConfig(kind="resampler", queries=2, layers=1, heads=2),
    ],
    ids=lambda projector: projector.kind,
)
def test_a_projector_of_an_import_keeps_its_kind(tmp_path: Path, projector: ProjectorConfig):
    """Those that pool have the shapes of a linear one."""
    made, that = seeing(projector=projector), tmp_path / "that"
    convert.import_source(made, that)
    folders.clip(folders.mixtral(tmp_path / "base") / "vision")
    convert.import_source(open_source(tmp_path / "base", projector=that), tmp_path / "new")
    again = open_source(tmp_path / "new")
    assert again.config.media["image"].projector == projector
    theirs, ours = ({path: leaf for path, leaf in one.leaves.items() if "/projector/" in path} for one in (made, again))
    assert theirs and hashes.stored_hash(theirs) == hashes.stored_hash(ours)
    partial = folders.released(tmp_path / "partial", keep=TRAINED["finetune"], tower=False)
    with pytest.raises(MoextendError, match=r"that cannot be the base of .*partial, .* a projector of another kind"):
        open_source(partial, base=that)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            {"projector": ProjectorConfig(kind="weave", rank=2, trunk="sound", width=6)},
            "on that of sound, and cannot be taken without it",
        ),
        (
            {
                "projector": ProjectorConfig(kind="pool", neighbours=8),
                "tower": dataclasses.replace(tiny.VISION, image_size=16),
            },
            "makes one token of 8 patches, and the model's tower has only 4",
        ),
        (
            {
                "projector": ProjectorConfig(kind="resampler", queries=2, layers=1, heads=2),
                "tower": dataclasses.replace(tiny.VISION, width=16),
            },
            "leads from width 16 to 24",
        ),
    ],
    ids=["on a trunk", "too many neighbours", "another width"],
)
def test_a_projector_of_an_import_that_does_not_fit_is_refused(tmp_path: Path, made: dict[str, Any], said: str):
    convert.import_source(seeing(**made), tmp_path / "that")
    folders.clip(folders.mixtral(tmp_path / "base") / "vision")
    with pytest.raises(MoextendError, match=said):
        open_source(tmp_path / "base", projector=tmp_path / "that")


@pytest.mark.parametrize("feature_layer", [0, -4])  # of two layers there are -1 to -3
def test_a_feature_layer_that_a_tower_does_not_have_is_refused(tmp_path: Path, feature_layer: int):
    clip, base = folders.clip(tmp_path / "clip"), folders.released(tmp_path / "base", config=folders.ALIGNED)
    convert.import_source(open_source(base), tmp_path / "imported")
    partial = folders.released(tmp_path / "partial", keep=TRAINED["finetune"], tower=False)
    for read in (
        lambda: open_source(clip, feature_layer=feature_layer),
        lambda: open_source(tmp_path / "imported", feature_layer=feature_layer),
        lambda: open_source(partial, base=tmp_path / "imported", feature_layer=feature_layer),
        lambda: open_tower(
            str(tmp_path / "imported"), kind="image", medium="image", seconds=1, feature_layer=feature_layer
        ),
    ):
        with pytest.raises(MoextendError, match=f"feature layer {feature_layer} is not among the 2 layers"):
            read()
    with pytest.raises(MoextendError, match="--feature_layer = 0 must be at most -1"):
        cli.call(["import", str(clip), str(tmp_path / "new"), "--feature_layer", "0"])
    vision = open_source(tmp_path / "imported", feature_layer=-3).config.vision
    assert vision and vision.feature_layer == -3


def test_process_0_alone_reads_the_base_of_a_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = folders.released(tmp_path / "base", config=folders.ALIGNED)
    convert.export_delta(open_source(folders.released(tmp_path / "whole")), tmp_path / "delta")
    said: list[str] = []
    monkeypatch.setattr(distributed, "from_first", lambda compute: said.append(compute()) or said[0])
    parts = open_source(tmp_path / "delta", base=base).record.parts
    assert parts and len(said) == 1
    monkeypatch.setattr(distributed, "from_first", lambda compute: said[0])  # as in the others
    monkeypatch.setattr(hashes, "base_hashes", None)
    assert open_source(tmp_path / "delta", base=base).record.parts == parts


@pytest.mark.parametrize(
    ("names", "kind"), [("", "linear"), ("0. 2. 4.", "mlp3x_gelu")], ids=["linear", "three layers"]
)
@pytest.mark.parametrize("prefix", ["model.mm_projector.", "mm_projector.", "model.visual.mm_projector."])
def test_a_projector_of_another_kind_is_refused_by_its_kind(tmp_path: Path, names: str, kind: str, prefix: str):
    tensors = {f"{prefix}{n}{part}": np.ones(4, np.float32) for n in names.split(" ") for part in ("weight", "bias")}
    path = folders.write(tmp_path / "projector", tensors, None)
    with pytest.raises(MoextendError, match=f"its projector is of kind {kind}; only mlp2x_gelu"):
        open_source(path, base=folders.released(tmp_path / "base", config=folders.ALIGNED))
    if "visual" not in prefix:
        with pytest.raises(MoextendError, match=f"its projector is of kind {kind}; only mlp2x_gelu"):
            open_source(path)


@pytest.mark.parametrize(
    ("name", "row", "value", "message"),
    [
        ("model.layers.1.block_sparse_moe.gate.weight", 2, np.nan, "router of layer 1 .* for expert 2"),
        ("model.layers.2.block_sparse_moe.gate_vision.weight", 0, -np.inf, "router of layer 2 .* for expert 4"),
    ],
)
def test_a_router_with_a_weight_that_is_no_number_is_refused(tmp_path: Path, name: str, row: int, value, message: str):
    def change(old: np.ndarray) -> np.ndarray:
        new = old.copy()
        new[row, 3] = value
        return new

    folder = folders.change(folders.released(tmp_path / "model"), {name: change})
    for use in (open_checkpoint, lambda folder: convert.import_source(open_source(folder), tmp_path / "imported")):
        with pytest.raises(MoextendError, match=message):
            use(folder)
    assert not (tmp_path / "imported").exists()
    if "vision" not in name:
        base = folders.change(folders.mixtral(tmp_path / "base"), {name: change})
        with pytest.raises(MoextendError, match=message):
            open_base(str(base), "embedded", feature_layer=-2)


@pytest.mark.parametrize("vision", ["embedded", "none"])
def test_an_extended_model_is_no_base_with_or_without_pictures(tmp_path: Path, vision: str):
    folder = folders.released(tmp_path / "extended")
    with pytest.raises(MoextendError, match="extended cannot be a base: it must hold a decoder that is not extended"):
        open_base(str(folder), vision, feature_layer=-1)


# --- links ------------------------------------------------------------------------------------------------------------


def _with_tower(folder: Path) -> Path:
    folders.clip(folders.mixtral(folder) / "vision")
    return folder


def _imported(folder: Path) -> Path:
    convert.import_source(open_source(folders.mixtral(folder.with_name("source"))), folder)
    return folder


def _pickled(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.zeros(value.shape) for name, value in folders.files("mixtral", folders.TEXT).items()}
    folders.write(folder, {}, huggingface.decoder_attributes(tiny.DECODER, dtype="float32"))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def _upcycled(folder: Path) -> Source:
    return open_upcycled(folder, experts=2, tokenizer_folder=folder)


def _dense(folder: Path) -> Path:
    tiny_llama.write_folder(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean = .* cannot be honoured"),
        ({"image_std": [0.5, 0.5, 0.5]}, "image_std"),
        ({"image_mean": 0.481455}, "image_mean"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"resample": 2}, "resample"),
        ({"image_mean": "grey"}, "image_mean = 'grey'"),
    ],
)
@pytest.mark.parametrize("imported", [False, True])
def test_a_tower_of_other_colours_is_refused(tmp_path: Path, said: dict[str, Any], named: str, imported: bool):
    """It would be fed CLIP's mean and deviation, and nobody would know."""
    folder = folders.clip(tmp_path / "clip")
    if imported:
        convert.import_source(open_source(folder), tmp_path / "imported")
        folder = tmp_path / "imported"
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(MoextendError, match=f"preprocessor_config.json: {named}"):
        open_source(folder)
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": said, "patch_size": 14}))
    with pytest.raises(MoextendError, match=f"/processor_config.json: {named}"):  # as transformers 5 writes it
        open_source(folder)


def test_pictures_prepared_as_published_are_fine(tmp_path: Path):
    folder = folders.clip(tmp_path / "clip")
    side = tiny.VISION.image_size
    published = {
        "crop_size": side, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": side,
    }  # fmt: skip
    for description in (published, {**published, "rescale_factor": 0.00392156862745098, "do_convert_rgb": None}):
        (folder / "preprocessor_config.json").write_text(json.dumps(description))
        open_source(folder)


WAYS_IN: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], Any]]] = {
    "tensors": (folders.mixtral, "model.safetensors", open_source),
    "a shard": (lambda f: folders.mixtral(f, shards=2), "model-00002-of-00002.safetensors", open_source),
    "an index": (lambda f: folders.mixtral(f, shards=2), "model.safetensors.index.json", open_source),
    "a pickle": (_pickled, "pytorch_model.bin", open_source),
    "config.json": (folders.mixtral, "config.json", open_source),
    "a tokenizer": (folders.mixtral, "tokenizer.model", open_source),
    "the tower's config.json": (_with_tower, "vision/config.json", open_source),
    "the tower's tensors": (_with_tower, "vision/model.safetensors", open_source),
    "the tower's side file": (_with_tower, "vision/preprocessor_config.json", open_source),
    "sizes of a tower": (lambda f: _beside(folders.released(f, tower=False)), "vision/config.json", open_source),
    "an import's record": (_imported, "moextend.json", open_source),
    "an import's tensors": (_imported, "model.safetensors", open_source),
    "a dense model's side file": (_dense, "chat_template.jinja", _upcycled),
    "a dense model's tensors": (_dense, "model.safetensors", _upcycled),
    "a dense model's config.json": (_dense, "config.json", _upcycled),
}


def _beside(folder: Path) -> Path:
    (folder / "vision").mkdir()
    (folder / "vision" / "config.json").write_text(json.dumps(tiny.clip_attributes(tiny.VISION)))
    return folder


@pytest.mark.parametrize("way", WAYS_IN)
def test_no_way_in_follows_a_link_out_of_the_folder(tmp_path: Path, way: str):
    make, name, read = WAYS_IN[way]
    folder = make(tmp_path / "model")
    read(folder)  # it is whole
    link, secret = folder / name, tmp_path / "secret"
    link.rename(secret)
    link.symlink_to(secret)
    with pytest.raises(MoextendError, match=rf"{re.escape(name)} is a link out of its folder"):
        read(folder)


def test_a_setting_names_a_folder_or_the_embedded_base():
    assert (folder_of("embedded"), folder_of("embedded", inside="vision")) == (EMBEDDED, EMBEDDED / "vision")
    assert folder_of("some/where", inside="vision") == Path("some/where")


@pytest.mark.parametrize(("kind", "inside"), [("image", "vision"), ("video", "vision"), ("audio", "audio")])
def test_the_embedded_tower_of_a_medium_is_that_of_its_kind(kind: Any, inside: str):
    settings = tiny.run_settings(media={"other": MediumSettings(kind=kind, tower="embedded")})
    base = open_base("embedded", "embedded", feature_layer=-2)
    source = with_media(base, settings, tokenizer_of_base(settings, base))
    expected = hashes.base_hashes(open_source(EMBEDDED / inside).leaves).parts["media/image"]
    assert hashes.base_hashes(source.leaves).parts["media/other"] == expected
    again = compose._tower("other", source.config.media["other"], "embedded")
    assert hashes.base_hashes(again).parts["media/other"] == expected


@pytest.mark.parametrize(
    ("attributes", "said"),
    [({"model_type": "llama"}, "upcycled"), ({"model_type": "bert"}, "'bert'"), ({}, "None"), (None, "does not exist")],
)
def test_another_kind_of_model_is_refused(tmp_path: Path, attributes, said: str):
    with pytest.raises(MoextendError, match=said):
        open_source(folders.write(tmp_path, {"a": np.zeros(2, np.float32)}, attributes))


def test_tags_of_the_released_layout(tmp_path: Path):
    config = open_source(folders.released(tmp_path)).config
    assert config.tags == ImageTags(start=40, end=41, pad=42) and config.vision and config.vision.feature_layer == -1
