"""Picture towers beside CLIP equal transformers' from files that it writes, go in and out, and see what they should.

`parity/test_families.py` holds SigLIP against arrays that were made elsewhere, with no torch needed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import few

from moextend_jax import cli
from moextend_jax.checkpoints import hashes, huggingface, names, store
from moextend_jax.checkpoints.leaves import read_slice
from moextend_jax.checkpoints.positions import bicubic
from moextend_jax.checkpoints.source import Source, open_source
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import RECIPES, DecoderConfig, MoextendError, VisionConfig, of_pictures
from moextend_jax.families.towers import TOWERS
from moextend_jax.media.image import prepare_image
from moextend_jax.models.vision import VisionTower
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.plan import sizes

DOCS = Path(__file__).parents[1] / "docs" / "families.md"
SIZES = {
    "clip": {"hidden": 24}, "siglip": {"hidden": 24}, "dinov2": {"hidden": 48},
    "dinov2_with_registers": {"hidden": 48, "registers": 3},
}  # fmt: skip


def config_of(family: str, *, image_size: int = 14, **more: Any) -> VisionConfig:
    """A tiny tower of 3 x 3 patches of 4 pixels, whose last pixels are not seen; of DINOv2 hidden is a multiple."""
    size = {"width": 16, "layers": 3, "heads": 2, "patch_size": 4, "norm_eps": 1e-6, "activation": "gelu_pytorch_tanh"}
    return VisionConfig(
        family=family, image_size=image_size, **TOWERS[family].fields, **{**size, **SIZES[family], **more}
    )


def structure(config: VisionConfig) -> VisionTower:
    return nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0), dtype="float32"))


def drawn(config: VisionConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {path: param.shape for path, param in by_path(nnx.state(structure(config))).items()}
    return {
        path: (rng.normal(float("norm/scale" in path), 0.3, shape)).astype(np.float32) for path, shape in shapes.items()
    }


def write(folder: Path, config: VisionConfig, **attributes: Any) -> Path:
    """A folder as it is published, made by the code under test: whether its names are right is tested elsewhere."""
    arrays = {f"media/image/tower/{path}": array for path, array in drawn(config).items()}
    model = of_pictures(decoder=DecoderConfig(), vision=config)
    huggingface.write_parameters(folder, arrays, table=config.family, config=model)
    huggingface.write_json(folder / "config.json", huggingface.vision_attributes(config) | attributes)
    return folder


def tower_of(source: Source) -> VisionTower:
    whole = {path: read_slice(leaf, (slice(None),) * len(leaf.shape)) for path, leaf in source.leaves.items()}
    arrays = {path.removeprefix("media/image/tower/"): jnp.asarray(array) for path, array in whole.items()}
    assert source.config.vision is not None
    return with_arrays(structure(source.config.vision), arrays)


# --- against transformers ---------------------------------------------------------------------------------------------


def made(folder: Path, kind: str, **more: Any) -> tuple[Any, Any]:
    """A random model of transformers, saved, and torch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 14, "patch_size": 4}
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**{**size, **more})).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(0.3 * torch.randn_like(leaf) + float("norm" in name and name.endswith("weight")))
    model.save_pretrained(folder)
    return model, torch


def assert_same_states(folder: Path, model: Any, torch: Any, *, size: int) -> None:
    """Of the tower in a folder and of transformers' model of it: every hidden state, and the patches' features."""
    images_nhwc = np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images_nhwc.transpose(0, 3, 1, 2).copy()), output_hidden_states=True)
    tower = tower_of(open_source(folder))
    assert tower.config.image_size == size
    for layer, state in enumerate(theirs.hidden_states):
        mine = tower.hidden_state(jnp.asarray(images_nhwc), layer=layer)
        np.testing.assert_allclose(mine, state.numpy(), atol=1e-5, rtol=0, err_msg=str(layer))
    patches = theirs.hidden_states[-2][:, -tower.config.patches :].numpy()
    np.testing.assert_allclose(tower(jnp.asarray(images_nhwc)), patches, atol=1e-5, rtol=0)
    last = tower.post_norm(tower.hidden_state(jnp.asarray(images_nhwc), layer=-1))
    np.testing.assert_allclose(last, theirs.last_hidden_state.numpy(), atol=1e-5, rtol=0)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip": ("SiglipVision", {"intermediate_size": 24}),
    "dinov2": ("Dinov2", {}),
    "dinov2 gated": ("Dinov2", {"use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "dinov2 with registers, gated": ("Dinov2WithRegisters", {"use_swiglu_ffn": True, "mlp_ratio": 3}),
}


@pytest.mark.parametrize("case", few(KINDS, "siglip"))
def test_parity_with_transformers_from_the_files_it_writes(tmp_path: Path, case: str):
    """And back: what is exported is its model again, of which it misses nothing."""
    kind, more = KINDS[case]
    model, torch = made(tmp_path / "theirs", kind, **more)
    assert_same_states(tmp_path / "theirs", model, torch, size=14)
    cli.call(["import", str(tmp_path / "theirs"), str(tmp_path / "imported")])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "ours")])
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert set(report["missing_keys"]) <= {"embeddings.mask_token"} and not report["unexpected_keys"]
    assert_same_states(tmp_path / "imported", again, torch, size=14)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert after.keys() == {
        tensor.file for tensor in names.tensors(_family(kind), open_source(tmp_path / "ours").config)
    }
    for name, array in after.items():
        original = before[name if name in before else name.removeprefix("vision_model.")]
        assert array.dtype == original.dtype and array.tobytes() == original.tobytes(), name


def _family(kind: str) -> str:
    return next(name for name, tower in TOWERS.items() if tower.architecture == f"{kind}Model")


@pytest.mark.parametrize("named", ["crop_size", "size"])
def test_a_dinov2_takes_pictures_as_its_processor_makes_them(tmp_path: Path, named: str):
    src = write(tmp_path / "src", config_of("dinov2"))
    (src / "preprocessor_config.json").write_text(json.dumps({named: {"height": 22, "width": 22}}))
    assert huggingface.read_vision_config(src, feature_layer=-2) == config_of("dinov2", image_size=22)
    assert open_source(src).config.vision == config_of("dinov2", image_size=22)
    (src / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 256}}))
    assert open_source(src).config.vision == config_of("dinov2")


GRIDS = {("dinov2 with registers", 13): ()} | dict.fromkeys(
    [("dinov2 with registers", 40), ("dinov2", 8)], pytest.mark.slow
)


@pytest.mark.parametrize(
    ("case", "size"),
    [
        pytest.param(case, size, marks=GRIDS.get((case, size), pytest.mark.long))
        for case in ("dinov2 with registers", "dinov2")
        for size in (8, 13, 17, 23, 40)
    ],
)
def test_positions_on_another_grid_are_those_that_transformers_takes(tmp_path: Path, case: str, size: int):
    """It resizes them for every picture; here they are resized once, and go out as they are then."""
    kind, more = KINDS[case]
    model, torch = made(tmp_path / "theirs", kind, **more)
    processor = {"crop_size": {"height": size, "width": size}, "size": {"shortest_edge": 256}, "resample": 3}
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert_same_states(tmp_path / "theirs", model, torch, size=size)
    cli.call(["import", str(tmp_path / "theirs"), str(tmp_path / "imported")])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "ours")])
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ours["image_size"] == size
    again = type(model).from_pretrained(tmp_path / "ours")
    assert again.embeddings.position_embeddings.shape[1] == (size // 4) ** 2 + 1
    for folder in ("imported", "ours"):
        assert_same_states(tmp_path / folder, again, torch, size=size)


@pytest.mark.parametrize("size", [(30, 30), (31, 50), (90, 17), (7, 9)])
@pytest.mark.parametrize("preparation", ["pad", "crop"])
def test_a_siglip_sees_what_its_processor_makes(size: tuple[int, int], preparation: Literal["pad", "crop"]):
    """The picture straight to a square, whatever the recipe."""
    module = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    picture = _noise(*size)
    for resample, number in huggingface.RESAMPLES.items():
        processor = module.SiglipImageProcessorPil(size={"height": 30, "width": 30}, resample=number)
        wanted = processor(picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        tower = config_of("siglip", resample=resample)
        ours = prepare_image(picture, size=30, preparation=preparation, tower=tower)
        np.testing.assert_allclose(ours, wanted, atol=1e-6)


@pytest.mark.parametrize("size", [(28, 28), (31, 50), (50, 31), (200, 29), (17, 20)])
def test_a_dinov2_sees_the_colours_that_its_processor_makes(size: tuple[int, int]):
    module = pytest.importorskip("transformers.models.bit.image_processing_pil_bit")
    levels = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = module.BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **levels)
    wanted = processor(_noise(*size), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    ours = prepare_image(_noise(*size), size=28, preparation="crop", tower=config_of("dinov2"))
    np.testing.assert_allclose(ours, wanted, atol=1e-6)


def _noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_what_pads_a_picture_is_the_mean_of_its_tower():
    red = Image.new("RGB", (40, 20), (255, 0, 0))
    ours = prepare_image(red, size=40, preparation="pad", tower=config_of("dinov2"))
    assert np.abs(ours[:10]).max() < 0.02 and np.abs(ours[12:28]).min() > 1


@pytest.mark.parametrize("antialiased", [False, True])
@pytest.mark.parametrize(("size", "new"), [(3, 7), (37, 16), (16, 37), (4, 1), (5, 5)])
def test_resizing_keeps_what_is_even_and_where_it_is(size: int, new: int, antialiased: bool):
    weights = bicubic(size, new, antialiased=antialiased)
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(weights, weights[::-1, ::-1], atol=1e-6)
    if size == new:
        np.testing.assert_array_equal(weights, np.eye(size))


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOWERS)
def test_gradient_reaches_every_leaf_up_to_the_feature_layer_and_none_above(family: str):
    config = config_of(family)
    images_nhwc = np.random.default_rng(2).normal(size=(2, 14, 14, 3)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(arrays: dict[str, jax.Array]) -> jax.Array:
        return jnp.sum(jnp.sin(3 * with_arrays(structure(config), arrays)(jnp.asarray(images_nhwc))))

    for path, leaf in gradient({path: jnp.asarray(array) for path, array in drawn(config).items()}).items():
        if path.startswith("layers/"):
            by_layer = np.abs(leaf).max(axis=tuple(range(1, leaf.ndim)))
            # A key bias shifts all scores of a query alike, which softmax takes away: zero but for rounding.
            assert "key_bias" in path or (by_layer[:2] > 1e-6).all(), path
            assert by_layer[2] == 0, path
        else:
            assert (np.abs(leaf).max() > 1e-6) == ("post_norm" not in path), path


def test_pixels_beyond_the_last_whole_patch_are_not_seen():
    tower = with_arrays(
        structure(config_of("siglip")), {p: jnp.asarray(a) for p, a in drawn(config_of("siglip")).items()}
    )
    images_nhwc = np.random.default_rng(2).normal(size=(2, 14, 14, 3)).astype(np.float32)
    other_nhwc = images_nhwc.copy()
    other_nhwc[:, 12:], other_nhwc[:, :, 12:] = 9, 9
    np.testing.assert_array_equal(tower(jnp.asarray(images_nhwc)), tower(jnp.asarray(other_nhwc)))
    assert tower(jnp.asarray(images_nhwc)).shape == (2, 9, 16)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("family", ["siglip", "dinov2_with_registers"])
def test_features_do_not_depend_on_the_mesh(family: str):
    config = config_of(family)
    images_nhwc = np.random.default_rng(2).normal(size=(8, 14, 14, 3)).astype(np.float32)
    tiny.check_same_on_a_mesh(structure(config), drawn(config), images_nhwc)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TOWERS)
def test_a_tower_comes_back_bit_for_bit(tmp_path: Path, family: str):
    """Alone, and beside a decoder."""
    src = write(tmp_path / "src", config_of(family))
    levels = huggingface.preprocessor(config_of(family)) | {"crop_size": 14}
    (src / "preprocessor_config.json").write_text(json.dumps(levels))
    cli.call(["import", str(src), str(tmp_path / "imported"), "--feature_layer=-2"])
    assert open_source(tmp_path / "imported").config.vision == config_of(family)
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    base = folders.mixtral(tmp_path / "base")
    cli.call(["import", str(base), str(tmp_path / "both"), f"--vision={src}"])
    cli.call(["export", str(tmp_path / "both"), str(tmp_path / "apart"), "--layout=mixtral"])
    for out in (tmp_path / "out", tmp_path / "apart" / "vision"):
        folders.assert_same(folders.read(out), folders.read(src))
        for name in ("config.json", "preprocessor_config.json"):
            assert json.loads((out / name).read_text()) == json.loads((src / name).read_text())


def test_what_a_tower_of_before_says_of_itself_is_clip_s():
    attributes = store.medium_attributes(tiny.PLAIN.media["image"])
    kept = ("width", "hidden", "layers", "heads", "image_size", "patch_size", "norm_eps", "activation", "feature_layer")
    before = attributes | {"tower": {name: attributes["tower"][name] for name in kept}}
    assert store.medium_of(before, where="image") == tiny.PLAIN.media["image"]


@pytest.mark.parametrize("name", sizes.TOWERS)
def test_sizes_are_written_and_read_again(name: str, tmp_path: Path):
    huggingface.write_json(tmp_path / "config.json", huggingface.vision_attributes(sizes.TOWERS[name]))
    assert huggingface.read_vision_config(tmp_path, feature_layer=-2) == sizes.TOWERS[name]


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_config_does_not_say_is_what_transformers_takes(nested: bool, tmp_path: Path):
    own = {"model_type": "siglip_vision_model"}
    attributes = {"model_type": "siglip", "text_config": {}, "vision_config": own} if nested else own
    huggingface.write_json(tmp_path / "config.json", attributes)
    read = huggingface.read_vision_config(tmp_path, feature_layer=-2)
    assert read == sizes.TOWERS["siglip-base-patch16-224"]


def test_siglip2_of_one_size_may_be_resized_bilinearly(tmp_path: Path):
    src = write(tmp_path / "src", config_of("siglip"))
    (src / "preprocessor_config.json").write_text(json.dumps({"resample": 2, "size": {"height": 14, "width": 14}}))
    assert open_source(src).config.vision == config_of("siglip", resample="bilinear")
    cli.call(["import", str(src), str(tmp_path / "imported")])
    assert open_source(tmp_path / "imported").config.vision == config_of("siglip", resample="bilinear")
    whole = of_pictures(decoder=tiny.DECODER, vision=config_of("siglip", resample="bilinear"))
    export_transformers(folders.source_of(whole), tmp_path / "hf", recipe=RECIPES["paper"], max_shard_bytes=1 << 30)
    assert open_source(tmp_path / "hf").config.vision == whole.vision


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("siglip", {"model_type": "siglip2_vision_model"}, "NaFlex.* is not supported"),
        ("siglip", {"hidden_act": "relu"}, "hidden_act = 'relu' cannot be honoured"),
        ("siglip", {"image_size": [14, 14]}, "image_size must be one positive number"),
        ("siglip", {"image_size": 3}, "patch_size be at most image_size"),
        ("dinov2", {"use_swiglu_ffn": 1}, "use_swiglu_ffn must be true or false"),
        ("dinov2", {"use_swiglu_ffn": True}, "mlp.weights_in"),
        ("dinov2", {"qkv_bias": False}, "qkv_bias = False cannot be honoured"),
        ("dinov2", {"mlp_ratio": 2.5}, "mlp_ratio must be one positive number"),
        ("dinov2", {"model_type": "dinov3_vit"}, "model_type is 'dinov3_vit'"),
        ("dinov2", {"mlp_ratio": 4}, "mlp.fc1"),
        ("dinov2_with_registers", {"num_register_tokens": 0}, "num_register_tokens must be one positive number"),
        ("dinov2_with_registers", {"num_register_tokens": 2}, "register_tokens has shape"),
    ],
)
def test_another_network_is_refused_in_a_line(tmp_path: Path, family: str, change: dict[str, Any], message: str):
    src = write(tmp_path / "src", config_of(family), **change)
    with pytest.raises(MoextendError, match=message) as refused:
        open_source(src)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("family", "said", "message"),
    [
        ("siglip", {"image_mean": [0.485, 0.456, 0.406]}, "image_mean .* as for SigLIP"),
        ("siglip", {"size": {"height": 28, "width": 28}}, "size = .*height.* a picture is made as large as the tower"),
        ("siglip", {"resample": 0}, "resample = 0 cannot be honoured"),
        ("dinov2", {"image_std": [0.5, 0.5, 0.5]}, "image_std .* as for DINOv2"),
        ("dinov2", {"resample": 2}, "resample = 2 cannot be honoured"),
        ("dinov2", {"crop_size": {"height": 14, "width": 18}}, "crop_size .*only squares of 4 to 56 pixels"),
        ("dinov2", {"crop_size": 3}, "crop_size or size = 3 cannot be honoured"),
        ("dinov2", {"crop_size": 57}, "crop_size or size = 57 cannot be honoured"),
        ("dinov2", {"crop_size": "14"}, "crop_size or size = '14' cannot be honoured"),
        ("siglip", {"rescale_factor": 10**400}, "rescale_factor = 1000.* cannot be honoured"),
        ("clip", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean .* as for OpenAI's CLIP"),
    ],
)
def test_other_pictures_are_refused_in_a_line(tmp_path: Path, family: str, said: dict[str, Any], message: str):
    src = write(tmp_path / "src", config_of(family))
    (src / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(MoextendError, match=f"preprocessor_config.json: {message}"):
        open_source(src)


@pytest.mark.parametrize(
    ("field", "value"), [("family", "vit"), ("class_token", True), ("levels", "clip"), ("levels", "mine"), ("grid", 3)]
)
def test_a_folder_that_contradicts_itself_is_refused(tmp_path: Path, field: str, value: Any):
    cli.call(["import", str(write(tmp_path / "src", config_of("siglip"))), str(tmp_path / "imported")])
    record = json.loads((tmp_path / "imported" / store.FILE).read_text())
    record["model"]["media"]["image"]["tower"][field] = value
    (tmp_path / "imported" / store.FILE).write_text(json.dumps(record))
    with pytest.raises(MoextendError, match=f"cannot be read: .*{field}"):
        open_source(tmp_path / "imported")


def test_layouts_of_whole_models_hold_towers_that_their_programs_read(tmp_path: Path):
    config = dataclasses.replace(config_of("siglip"), width=tiny.VISION.width)
    src = write(tmp_path / "src", config)
    whole = ["--projector", str(folders.projector(tmp_path / "projector", table="llava_hf"))]
    cli.call(["import", str(folders.mixtral(tmp_path / "base")), str(tmp_path / "both"), f"--vision={src}", *whole])
    (tmp_path / "both" / "tokenizer.model").unlink()  # which is none
    for layout, message in (
        ("released", "this model has a tower of family siglip"),
        ("clip", "layout clip has no place for a tower of family siglip"),
    ):
        with pytest.raises(MoextendError, match=message):
            cli.call(["export", str(tmp_path / "both"), str(tmp_path / layout), "--layout", layout])
    for layout, original in (("siglip", src), ("llava", tmp_path / "projector"), ("mixtral", tmp_path / "base")):
        cli.call(["export", str(tmp_path / "both"), str(tmp_path / layout), "--layout", layout])
        folders.assert_same(folders.read(tmp_path / layout), folders.read(original))


def test_a_whole_released_model_with_another_tower_is_refused(tmp_path: Path):
    released = folders.released(tmp_path / "released")
    attributes = json.loads((released / "config.json").read_text())
    other = huggingface.vision_attributes(config_of("siglip"))
    huggingface.write_json(released / "config.json", attributes | {"vision_config": other})
    with pytest.raises(MoextendError, match="released holds a tower of family siglip"):
        open_source(released)


def test_a_head_and_a_text_half_are_left_where_they_are(tmp_path: Path):
    src = write(tmp_path / "src", config_of("siglip"))
    own = load_file(src / "model.safetensors")
    others = ("text_model.embeddings.token_embedding.weight", "logit_bias", "vision_model.head.probe")
    save_file(own | {name: np.ones(2, np.float32) for name in others}, src / "model.safetensors")
    attributes = json.loads((src / "config.json").read_text()) | {"vision_use_head": True}
    huggingface.write_json(
        src / "config.json", {"model_type": "siglip", "text_config": {}, "vision_config": attributes}
    )
    cli.call(["import", str(src), str(tmp_path / "imported")])
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    folders.assert_same(load_file(tmp_path / "out" / "model.safetensors"), own)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vision_use_head"] is False


def test_the_docs_have_the_table():
    written = DOCS.read_text().splitlines()
    for name, tower in TOWERS.items():
        fields = ", ".join(f"`{field} = {value}`" for field, value in tower.fields.items()) or "none"
        known = ", ".join(tower.published)
        types = ", ".join(f"`{kind}`" for kind in (tower.model_type, tower.whole) if kind)
        assert f"| {name} | {types} | {fields} | {known} |" in written


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_what_transformers_5_holds_of_a_dinov2_in_memory_is_read(family: str, tmp_path: Path):
    """As `torch.save(model.state_dict())` names it: the same weights as by its published names."""
    pytest.importorskip("torch", reason="transformers' models need torch (the extra `torch`)")
    from transformers import AutoModel

    src = write(tmp_path / "src", config_of(family))
    AutoModel.from_pretrained(src).save_pretrained(tmp_path / "memory", save_original_format=False)
    ours, theirs = (open_source(folder).leaves for folder in (src, tmp_path / "memory"))
    assert hashes.stored_hash(ours) == hashes.stored_hash(theirs)
