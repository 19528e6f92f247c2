"""Folders as other programs write them hold the same models: their names, fused experts, prefixes, whole LLaVAs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import folders
import ml_dtypes
import numpy as np
import pytest
import tiny

from moextend_jax import cli
from moextend_jax.checkpoints import hashes, huggingface, leaves, names
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.checkpoints.spelling import unwrapped
from moextend_jax.checkpoints.tensors import open_tensors
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import RECIPES, ImageTags, MoextendError, with_extension
from moextend_jax.runs.run import open_run

ATTRIBUTES = huggingface.decoder_attributes(tiny.DECODER, dtype="bfloat16")


# --- transformers 5 ---------------------------------------------------------------------------------------------------


def test_fused_experts_are_the_experts(tmp_path: Path):
    plain = folders.files("mixtral", folders.TEXT)
    one = open_source(folders.write(tmp_path / "plain", plain, ATTRIBUTES))
    other = open_source(folders.write(tmp_path / "fused", folders.fused(plain), ATTRIBUTES, shards=2))
    assert hashes.stored_hash(other.leaves) == hashes.stored_hash(one.leaves)
    assert any("fused" in note for note in other.notes) and not one.notes
    assert all(leaf.files for leaf in other.leaves.values())  # their bytes are in files, so hashes can be remembered
    folders.assert_same(open_checkpoint(tmp_path / "fused").arrays, folders.arrays(folders.TEXT))


def test_fused_experts_are_exported_by_the_published_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = folders.files("mixtral", folders.TEXT)
    folders.write(tmp_path / "fused", folders.fused(plain), ATTRIBUTES)
    cli.call(["import", str(tmp_path / "fused"), str(tmp_path / "imported")])
    assert "fused in 6 tensors" in capsys.readouterr().out
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    folders.assert_same(folders.read(tmp_path / "out"), plain)


def test_of_fused_experts_only_the_rows_of_a_shard_are_read(tmp_path: Path):
    folder = folders.write(tmp_path, folders.fused(folders.files("mixtral", folders.TEXT)), ATTRIBUTES)
    runs = []

    def watched(name: str, tensor: Any) -> Any:
        def run(first: int, last: int) -> np.ndarray:
            runs.append((name, last - first))
            return tensor.run(first, last)

        return tensor._replace(run=run)

    from moextend_jax.checkpoints.spelling import published

    stored, _ = published({name: watched(name, tensor) for name, tensor in open_tensors(folder).items()})
    leaf = leaves.match(stored, table="mixtral", config=folders.TEXT, where=folder)["decoder/layers/moe/experts/w_up"]
    part = (slice(1, 2), slice(2, 4), slice(3, 5), slice(10, 20))
    np.testing.assert_array_equal(leaves.read_slice(leaf, part), folders.arrays(folders.TEXT)[leaf.path][part])
    assert runs == [("model.layers.1.mlp.experts.gate_up_proj", 10 * tiny.DECODER.width)] * 2


@pytest.mark.parametrize(
    "name", ["model.layers.0.block_sparse_moe.experts.1.w2.weight", "model.layers.2.mlp.gate.weight"]
)
def test_two_spellings_in_one_file_are_refused(tmp_path: Path, name: str):
    plain = folders.files("mixtral", folders.TEXT)
    mixed = folders.fused(plain) if "block" in name else dict(plain)
    mixed[name] = (plain | folders.fused(plain))[name]
    folders.write(tmp_path, mixed, ATTRIBUTES)
    with pytest.raises(MoextendError, match="Not asked for: .*" + re.escape(name if "mlp" in name else "mlp.experts")):
        open_source(tmp_path)


def test_a_fused_tensor_of_another_size_is_refused(tmp_path: Path):
    tensors = folders.fused(folders.files("mixtral", folders.TEXT))
    name = "model.layers.1.mlp.experts.gate_up_proj"
    folders.write(tmp_path, tensors | {name: tensors[name][:, :-2]}, ATTRIBUTES)
    with pytest.raises(MoextendError, match=r"layers.1.block_sparse_moe.experts.0.w1.weight has shape \[39, 24\]"):
        open_source(tmp_path)
    folders.write(tmp_path, tensors | {name: tensors[name][:3]}, ATTRIBUTES)
    with pytest.raises(MoextendError, match="Missing: model.layers.1.block_sparse_moe.experts.3.w1.weight"):
        open_source(tmp_path)


def test_a_tower_of_transformers_5_is_the_tower(tmp_path: Path):
    plain = folders.clip(tmp_path / "plain")
    tensors = {name.removeprefix("vision_model."): value for name, value in folders.read(plain).items()}
    assert "embeddings.class_embedding" in tensors
    folder = folders.write(tmp_path / "five", tensors, tiny.clip_attributes(tiny.VISION))
    assert hashes.stored_hash(open_source(folder).leaves) == hashes.stored_hash(open_source(plain).leaves)
    tensors["vision_model.embeddings.class_embedding"] = tensors.pop("embeddings.class_embedding")
    folders.write(tmp_path / "mixed", tensors, tiny.clip_attributes(tiny.VISION))
    with pytest.raises(MoextendError, match="Not asked for: embeddings.patch_embedding.weight"):
        open_source(tmp_path / "mixed")


# --- prefixes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_forward_module.", "base_model.model.", "model."]
)
def test_a_prefix_that_all_names_share_is_taken_off_and_said(tmp_path: Path, prefix: str):
    plain = folders.files("mixtral", folders.TEXT)
    source = open_source(folders.write(tmp_path, {prefix + name: v for name, v in plain.items()}, ATTRIBUTES))
    assert any(repr(prefix) in note for note in source.notes)
    expected = {path: leaf.shape for path, leaf in source.leaves.items()}
    assert expected == {path: array.shape for path, array in folders.arrays(folders.TEXT).items()}
    some = {prefix + name if "layers" in name else name: value for name, value in plain.items()}
    folders.write(tmp_path, some, ATTRIBUTES)
    with pytest.raises(MoextendError, match="Not asked for: " + re.escape(prefix)):
        open_source(tmp_path)


def test_a_decoder_with_a_tied_head_keeps_the_model_in_its_names(tmp_path: Path):
    tied = dataclasses.replace(folders.TEXT, decoder=dataclasses.replace(tiny.DECODER, tied_head=True))
    folder = folders.mixtral(tmp_path, config=tied)
    assert all(name.startswith("model.") for name in folders.read(folder)) and not open_source(folder).notes


def test_a_tied_head_may_stand_there_a_second_time(tmp_path: Path):
    """torch.save(model.state_dict()) writes it; transformers, too, reads the embedding alone."""
    tied = dataclasses.replace(folders.TEXT, decoder=dataclasses.replace(tiny.DECODER, tied_head=True))
    tensors = folders.files("mixtral", tied)
    attributes = huggingface.decoder_attributes(tied.decoder, dtype="bfloat16")
    twice = folders.write(
        tmp_path / "twice", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, attributes
    )
    once = folders.write(tmp_path / "once", tensors, attributes)
    assert hashes.stored_hash(open_source(twice).leaves) == hashes.stored_hash(open_source(once).leaves)


def test_a_run_says_what_it_read_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = tiny.write_base(tmp_path / "base")
    tensors = {"module." + name: value for name, value in folders.read(base).items()}
    folders.write(base, tensors, None)
    open_run(tiny.run_settings(base=str(base), vision=str(base / "vision")), tmp_path / "run")
    assert f"{base}: read without 'module.', which stands before all of its names" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["self_attn.q_proj.lora_A.weight", "self_attn.q_proj.base_layer.weight"])
def test_an_adapter_is_no_model(tmp_path: Path, name: str):
    tensors = {f"base_model.model.model.layers.0.{name}": np.ones((2, 3), np.float32)}
    folders.write(tmp_path, tensors, None).joinpath("model.safetensors").rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(MoextendError, match=f"PEFT adapter .*{name}.*merge_and_unload"):
        open_source(tmp_path)


def test_names_without_a_wrapper_stay(tmp_path: Path):
    folder = folders.mixtral(tmp_path)
    stored, notes = unwrapped(open_tensors(folder))
    assert not notes and stored.keys() == folders.read(folder).keys()


# --- a whole LLaVA ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["", "vision_model."], ids=["5", "4"])
@pytest.mark.parametrize("memory", [False, True], ids=["files", "memory"])
def test_a_whole_llava_is_imported(tmp_path: Path, memory: bool, tower: str):
    folder = folders.llava(tmp_path / "llava", memory=memory, tower=tower)
    cli.call(["import", str(folder), str(tmp_path / "imported")])
    for source in (folder, tmp_path / "imported"):
        opened = open_checkpoint(source)
        folders.assert_same(opened.arrays, folders.arrays(folders.ALIGNED))
        assert opened.source.record.layout == "hf" and opened.config.extension is None
        assert opened.config.vision == dataclasses.replace(tiny.VISION, feature_layer=-2)
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "projector"), "--layout", "llava"])
    assert "multi_modal_projector.linear_1.bias" in folders.read(tmp_path / "projector")
    assert open_source(folders.mixtral(tmp_path / "m"), vision=folders.clip(tmp_path / "c"), projector=folder)


@pytest.mark.parametrize("memory", [False, True], ids=["files", "memory"])
def test_an_extended_model_in_transformers_names_is_read(tmp_path: Path, memory: bool):
    """As modeling_moextend.py names what it adds: router columns, calibrator, experts fused with the pretrained."""
    added = {
        "sources": [1, 3],
        "image_tags": {"start": 50, "end": 7, "pad": 42}, "weight_guard": "none", "text_isolation": "strict",
        "auto_map": {"AutoConfig": "modeling_moextend.MoExtendConfig"},
    }  # fmt: skip
    folder = folders.llava(tmp_path / "hf", config=folders.RELEASED, memory=memory, tower="", **added)
    cli.call(["import", str(folder), str(tmp_path / "imported")])
    for source in (folder, tmp_path / "imported"):
        opened = open_checkpoint(source)
        folders.assert_same(opened.arrays, folders.arrays(folders.RELEASED))
        assert opened.config.extension == tiny.EXTENSION
        assert opened.config.tags == ImageTags(start=50, end=7, pad=42)
        facts = opened.source.record.facts
        assert (facts["recipe"]["weight_guard"], facts["text_isolation"]) == ("none", "strict")
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    folders.assert_same(folders.read(tmp_path / "out"), folders.files("released", folders.RELEASED))


@pytest.mark.parametrize("saved", ["files", "memory", "earlier"])
def test_extensions_are_read_however_transformers_saves_them(tmp_path: Path, saved: str):
    """By our own class: as it is exported, by its names in memory, and as the version wrote it that knew one."""
    config = folders.CHAIN if saved != "earlier" else with_extension(folders.ALIGNED, tiny.EXTENSION, name="pets")
    export_transformers(folders.source_of(config), tmp_path / "hf", recipe=RECIPES["paper"], max_shard_bytes=1 << 30)
    tensors, at = folders.read(tmp_path / "hf"), tmp_path / "hf" / "config.json"
    attributes = json.loads(at.read_text())
    if saved == "memory":
        before = "language_model."
        text = {name.removeprefix(before): tensor for name, tensor in tensors.items() if name.startswith(before)}
        own = {name.replace("block_sparse_moe", "mlp"): t for name, t in text.items() if ".extensions." in name}
        fused = (folders.fused(text) | own).items()
        text = {n if n.startswith("lm_head") else n.replace("model.", "model.language_model."): t for n, t in fused}
        tensors = {f"model.{name}": t for name, t in tensors.items() if not name.startswith(before)} | text
    elif saved == "earlier":
        (own,) = attributes.pop("extensions")
        attributes["moextend"]["extension"] = own.pop("name")
        attributes |= {("add_layer" if name == "layers" else name): value for name, value in own.items()
                       if name not in ("medium", "share", "calibrator")}  # fmt: skip
        tensors = {name.replace(".extensions.0.", ".extension."): tensor for name, tensor in tensors.items()}
    opened = open_checkpoint(folders.write(tmp_path / "hf", tensors, attributes), dtype="float32")
    assert [*opened.config.extensions.items()] == [*config.extensions.items()]
    folders.assert_same(opened.arrays, folders.arrays(config, dtype=np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act = 'relu'"),
        ({"multimodal_projector_bias": False}, "multimodal_projector_bias = False"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy = 'full'"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer = \[-2, -5\] .*only one layer"),
        ({"vision_feature_layer": -9}, "feature layer -9 is not among"),
        ({"text_config": {"model_type": "llama"}}, "model_type is 'llama'"),
        ({"text_config": None}, "without text_config"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_feature_select_strategy = 'default'"),
        ({"vision_config": {"model_type": "dinov2_with_registers"}}, "'dinov2_with_registers' cannot be honoured"),
        ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' cannot be honoured"),
        ({"quantization_config": {}}, "quantization_config: weights quantised by"),
        ({"moextend": {"recipe": {"prompt": "x" * 9000}}}, "moextend.recipe.prompt = 'xxxx.{,200}$"),
        ({"extensions": {}}, "extensions: {} is no list of extensions"),
        ({"extensions": [{"name": "a", "layers": [9], "sources": [0]}]}, r"extensions: extended layers \(9,\)"),
        ({"extensions": [{"name": "a", "layers": [0]}]}, "extensions: a: sources must be set"),
        ({"extensions": [{"name": "a", "layers": [0], "sources": [0]}] * 2}, "extensions: 'a' is no name"),
        ({"add_layer": [0], "new_experts": -3}, "new_experts = -3"),
        ({"add_layer": [0], "new_experts": 1 << 30}, "new_experts = 1073741824 is impossible"),
        ({"add_layer": [0], "wide": 1 << 30}, "wide = 1073741824 is impossible"),
        ({"add_layer": [0], "start": ["copy"]}, r"start = \['copy'\] cannot be honoured"),
        ({"text_config": {"model_type": ["mixtral"]}}, r"model_type is \['mixtral'\]"),
    ],
)
def test_a_llava_that_is_another_network_is_refused(tmp_path: Path, changes: dict[str, Any], message: str):
    folder = folders.llava(tmp_path, **changes)
    with pytest.raises(MoextendError, match=f"config.json.*{message}|{message}.*config.json"):
        open_source(folder)


def test_sizes_that_transformers_leaves_out_are_its_own(tmp_path: Path):
    """Of a configuration inside another it writes what differs from the class's defaults."""
    kinds = {"text_config": "mixtral", "vision_config": "clip_vision_model"}
    folder = folders.llava(tmp_path, **{name: {"model_type": kind} for name, kind in kinds.items()})  # pyright: ignore[reportArgumentType]
    with pytest.raises(MoextendError, match="its sizes ask for|has shape .* expected .*32000, 4096|Missing"):
        open_source(folder)
    text = folders.llava_attributes()["text_config"]
    folders.llava(tmp_path, text_config={name: value for name, value in text.items() if name != "rms_norm_eps"})
    assert open_source(tmp_path).config.decoder == dataclasses.replace(tiny.DECODER, norm_eps=1e-5)


def test_what_transformers_writes_is_read(tmp_path: Path):
    """The real thing, both ways to save it: the same arrays as its own state."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    text = transformers.MixtralConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, num_local_experts=4, rms_norm_eps=1e-5,
    )  # fmt: skip
    tower = transformers.CLIPVisionConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=3)
    )
    found = []
    for original in (True, False):
        model.save_pretrained(tmp_path / str(original), save_original_format=original)
        found.append(open_source(tmp_path / str(original)))
    assert hashes.stored_hash(found[0].leaves) == hashes.stored_hash(found[1].leaves)
    state = model.state_dict()
    expert = state["model.language_model.layers.1.mlp.experts.gate_up_proj"][2].numpy()
    for nth, path in enumerate(("w_gate", "w_up")):
        ours = found[1].leaves[f"decoder/layers/moe/experts/{path}"].ours((1, 2))
        np.testing.assert_array_equal(ours, expert[40 * nth : 40 * (nth + 1)].T)


# --- element types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("norm", np.float32), (r"experts\.[01]\.", np.float16)], ids=["norms", "some experts"]
)
def test_several_element_types_are_read_when_all_is_cast(tmp_path: Path, pattern: str, dtype: Any):
    tensors = folders.files("mixtral", folders.TEXT)
    mixed = {name: value.astype(dtype) if re.search(pattern, name) else value for name, value in tensors.items()}
    folder = folders.write(tmp_path / "mixed", mixed, ATTRIBUTES)
    with pytest.raises(MoextendError, match="has element type .*--dtype bfloat16"):
        open_source(folder)
    cli.call(["import", str(folder), str(tmp_path / "new"), "--dtype", "bfloat16"])
    made = open_checkpoint(tmp_path / "new").arrays
    half = {name: value.astype(ml_dtypes.bfloat16) for name, value in mixed.items()}
    folders.assert_same(made, open_checkpoint(folders.write(tmp_path / "half", half, ATTRIBUTES)).arrays)
    folders.assert_same(made, open_checkpoint(folder, dtype="bfloat16").arrays)


# --- what lies around -------------------------------------------------------------------------------------------------


def pickles(folder: Path) -> Path:
    torch = pytest.importorskip("torch")
    tensors = folders.files("mixtral", folders.TEXT, dtype=np.float32)
    folders.write(folder, {}, ATTRIBUTES | {"torch_dtype": "float32"})
    (folder / "model.safetensors").unlink()
    for n in range(2):
        part = {name: torch.from_numpy(value) for name, value in list(tensors.items())[n::2]}
        torch.save(part, folder / f"pytorch_model-0000{n + 1}-of-00002.bin")
        for name in part:
            tensors[name] = part[name]
    index = {name: f"pytorch_model-0000{n % 2 + 1}-of-00002.bin" for n, name in enumerate(tensors)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_trainers_checkpoint_is_read_without_what_lies_beside(tmp_path: Path, kind: str):
    folder = (
        folders.mixtral(tmp_path / "checkpoint-500") if kind == "safetensors" else pickles(tmp_path / "checkpoint-5")
    )
    for name in ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state_0.pth", "training_args.bin", "optimizer.bin"):
        (folder / name).write_bytes(b"not to be read")
    (folder / "trainer_state.json").write_text("{}")
    assert open_source(folder).parts == {"decoder"}


@pytest.mark.parametrize(
    ("inside", "message"),
    [
        (
            ["checkpoint-500/", "checkpoint-1000/"],
            "trainer's folder .* name one of them: checkpoint-1000, checkpoint-500",
        ),
        (["global_step500/", "latest", "zero_to_fp32.py"], "DeepSpeed's shards global_step500: .*zero_to_fp32.py"),
        (["pytorch_model_fsdp_0/"], "FSDP's shards pytorch_model_fsdp_0: .*merge-weights"),
        (["snapshots/"], "hub's cache; name the folder that is in snapshots"),
        (["model.gguf"], "name the file itself: model.gguf"),
        (["training_args.bin", "checkpoint-7/"], "trainer's folder .*checkpoint-7"),
        ([], r"holds no \*.safetensors file$"),
    ],
)
def test_a_folder_of_folders_says_which_to_name(tmp_path: Path, inside: list[str], message: str):
    pytest.importorskip("torch")
    for name in inside:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).write_bytes(b"")
    with pytest.raises(MoextendError, match=message):
        open_source(tmp_path)


def test_mistrals_own_files_beside_the_shards_are_left_out(tmp_path: Path):
    folder = folders.mixtral(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    again = folders.write(tmp_path / "again", {"tok_embeddings.weight": np.ones((2, 2), folders.HALF)}, None)
    (again / "model.safetensors").rename(folder / "consolidated.safetensors")
    assert open_source(folder).parts == {"decoder"}


def test_a_folder_may_be_put_together_of_links(tmp_path: Path):
    """To files of another folder by their names, to a tower's folder, and into the hub's cache."""
    real = folders.mixtral(tmp_path / "real")
    folders.clip(tmp_path / "clip-vit")
    linked, cached = tmp_path / "linked", tmp_path / "cached"
    linked.mkdir()
    for path in real.iterdir():
        (linked / path.name).symlink_to(path)
    (linked / "vision").symlink_to(tmp_path / "clip-vit")
    blobs, snapshot = tmp_path / "hub" / "models--x" / "blobs", tmp_path / "hub" / "models--x" / "snapshots" / "0f"
    for folder in (blobs, snapshot, cached):
        folder.mkdir(parents=True)
    for n, path in enumerate(real.iterdir()):
        (blobs / f"0{n}").write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"0{n}")
        (cached / path.name).symlink_to(snapshot / path.name)
    expected = hashes.base_hashes(open_source(real).leaves).base
    assert open_source(linked).parts == {"decoder", "vision"}
    for folder in (snapshot, cached):
        assert hashes.base_hashes(open_source(folder).leaves).base == expected
    (tmp_path / "blobs").mkdir()
    (cached / "tokenizer.model").unlink()
    (tmp_path / "blobs" / "key").write_text("secret")  # a folder of that name alone is no cache
    (cached / "tokenizer.model").symlink_to(tmp_path / "blobs" / "key")
    with pytest.raises(MoextendError, match="tokenizer.model is a link out of its folder"):
        open_source(cached)


def test_names_of_the_tables_are_no_other_spelling(tmp_path: Path):
    """What this program writes it reads as it stands."""
    for table, config in (("mixtral", folders.TEXT), ("released", folders.RELEASED), ("clip", tiny.PLAIN)):
        listed = {tensor.file: None for tensor in names.tensors(table, config)}
        assert unwrapped(listed) == (listed, [])  # pyright: ignore[reportArgumentType]
