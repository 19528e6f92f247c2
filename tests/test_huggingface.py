"""Hugging Face folders: bitwise round trips, transformers' own numbers, and refusals that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx
from folders import assert_same, released_attributes
from safetensors.numpy import load_file, save_file

from moextend_jax.checkpoints import huggingface, names, released
from moextend_jax.config import DecoderConfig, ImageTags, ModelConfig, MoextendError, VisionConfig, with_vision
from moextend_jax.parameters import with_arrays

TABLES = {
    "mixtral": with_vision(tiny.PLAIN, None),
    "clip": tiny.PLAIN,
    "released": tiny.EXTENDED,
}


def half(config: ModelConfig, table: str) -> dict[str, np.ndarray]:
    """bfloat16 arrays of the table's paths."""
    paths = {row.path for row in names.tensors(table, config)}
    return {
        path: np.asarray(leaf).astype(ml_dtypes.bfloat16) for path, leaf in tiny.arrays(config).items() if path in paths
    }


@pytest.mark.parametrize("table", TABLES)
def test_written_and_read_again_every_bit_is_the_same(table: str, tmp_path: Path):
    config = TABLES[table]
    arrays = half(config, table)
    huggingface.write_parameters(tmp_path, arrays, table=table, config=config)
    again = huggingface.read_parameters(tmp_path, table=table, config=config)
    assert_same(again, arrays)


def test_a_tied_head_is_not_in_the_file(tmp_path: Path):
    config = dataclasses.replace(TABLES["mixtral"], decoder=dataclasses.replace(tiny.DECODER, tied_head=True))
    huggingface.write_parameters(tmp_path, half(config, "mixtral"), table="mixtral", config=config)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = huggingface.read_parameters(tmp_path, table="mixtral", config=config)
    assert "decoder/head" not in again


# --- mistakes in files ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = TABLES["mixtral"]
    huggingface.write_parameters(tmp_path, half(config, "mixtral"), table="mixtral", config=config)
    huggingface.write_decoder_config(tmp_path, config.decoder, dtype="bfloat16")
    return tmp_path


def read(folder: Path) -> dict[str, np.ndarray]:
    config = TABLES["mixtral"]
    return huggingface.read_parameters(folder, table="mixtral", config=config)


NORM = "model.layers.1.input_layernorm.weight"


def test_old_buffers_are_ignored(folder: Path):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[NORM][:3].copy()
    save_file(tensors, folder / "model.safetensors")
    read(folder)


@pytest.mark.parametrize("left", [0, 4, 100, 5000])
def test_a_truncated_file_is_an_error(folder: Path, left: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(MoextendError, match="cannot be read"):
        read(folder)


def test_a_folder_without_weights_is_an_error(tmp_path: Path):
    with pytest.raises(MoextendError, match=r"no \*\.safetensors"):
        read(tmp_path)


# --- config.json ------------------------------------------------------------------------------------------------------


def with_attributes(folder: Path, **changed) -> Path:
    path = folder / "config.json"
    attributes = json.loads(path.read_text()) | changed
    path.write_text(json.dumps({name: value for name, value in attributes.items() if value is not ...}))
    return folder


def test_sizes_round_trip(folder: Path):
    assert huggingface.read_decoder_config(folder) == tiny.DECODER


def test_vision_sizes(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(tiny.clip_attributes(tiny.VISION)))
    assert huggingface.read_vision_config(tmp_path, feature_layer=-1) == tiny.VISION


@pytest.mark.parametrize("head_dim", [None, ...])
def test_the_head_size_defaults_to_width_over_heads(folder: Path, head_dim):
    assert huggingface.read_decoder_config(with_attributes(folder, head_dim=head_dim)).head_size == 6


def test_transformers_5_writes_rope_theta_elsewhere(folder: Path):
    rope = {"rope_theta": 12345.0, "rope_type": "default"}
    config = huggingface.read_decoder_config(with_attributes(folder, rope_theta=..., rope_parameters=rope))
    assert config.rope_theta == 12345.0
    with pytest.raises(MoextendError, match="yarn"):
        huggingface.read_decoder_config(with_attributes(folder, rope_parameters=rope | {"rope_type": "yarn"}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", -1),
        ("sliding_window", True),
        ("mlp_bias", True),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("hidden_act", "relu"),
        ("model_type", "llama"),
        ("router_jitter_noise", 0.1),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(folder: Path, name: str, value):
    with pytest.raises(MoextendError, match=name):
        huggingface.read_decoder_config(with_attributes(folder, **{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretraining_tp", 1),
        ("unsloth_version", "2024.12.1"),
        ("auto_map", {"AutoModelForCausalLM": "x--modeling.X"}),
        ("mlp_bias", False),
        ("_flash_attn_2_enabled", True),
        ("partial_rotary_factor", 1.0),
        ("sliding_window", None),
    ],
)
def test_what_tools_write_about_themselves_is_no_obstacle(folder: Path, name: str, value):
    plain = huggingface.read_decoder_config(folder)
    assert huggingface.read_decoder_config(with_attributes(folder, **{name: value})) == plain


def test_a_sliding_window_is_nothing_in_rows_that_fit_and_refused_in_longer_ones(folder: Path):
    from moextend_jax.models.decoder import check_length

    config = huggingface.read_decoder_config(with_attributes(folder, sliding_window=4096))
    assert config.window == 4096
    assert huggingface.decoder_attributes(config, dtype="float32")["sliding_window"] == 4096
    check_length(4096, config)
    with pytest.raises(MoextendError, match="rows of 4097 tokens: .* sliding window of 4096"):
        check_length(4097, config)


@pytest.mark.parametrize("text", ["{", "[]", "", "null"])
def test_a_broken_config_is_an_error_that_names_the_file(tmp_path: Path, text: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(MoextendError, match="config.json"):
        huggingface.read_decoder_config(tmp_path)


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_a_config_without_a_size_is_an_error_that_names_it(folder: Path, name: str):
    """transformers' default for a left-out size is not ours to guess."""
    with pytest.raises(MoextendError, match=name):
        huggingface.read_decoder_config(with_attributes(folder, **{name: ...}))


def test_a_missing_folder_is_an_error(tmp_path: Path):
    with pytest.raises(MoextendError, match="nowhere"):
        huggingface.read_decoder_config(tmp_path / "nowhere")


# --- published config.json files --------------------------------------------------------------------------------------

MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": True,
    "vocab_size": 32000,
}  # fmt: skip
MIXTRAL_8X22B = MIXTRAL_8X7B | {
    "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536, "num_attention_heads": 48,
    "num_hidden_layers": 56, "router_aux_loss_coef": 0.001, "router_jitter_noise": 0.0,
    "transformers_version": "4.38.0",
}  # fmt: skip
M8X22B = DecoderConfig(width=6144, hidden=16384, layers=56, heads=48)
OF_EVERY_MODEL = {
    "_name_or_path": "", "add_cross_attention": False, "architectures": None, "bad_words_ids": None,
    "bos_token_id": None, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "decoder_start_token_id": None, "diversity_penalty": 0.0, "do_sample": False, "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0, "eos_token_id": None, "exponential_decay_length_penalty": None,
    "finetuning_task": None, "forced_bos_token_id": None, "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": False, "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length": 20, "min_length": 0,
    "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1, "num_return_sequences": 1,
    "output_attentions": False, "output_hidden_states": False, "output_scores": False, "pad_token_id": None,
    "prefix": None, "problem_type": None, "pruned_heads": {}, "remove_invalid_values": False,
    "repetition_penalty": 1.0, "return_dict": True, "return_dict_in_generate": False, "sep_token_id": None,
    "task_specific_params": None, "temperature": 1.0, "tf_legacy_loss": False, "tie_encoder_decoder": False,
    "tie_word_embeddings": True, "tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": None,
    "torchscript": False, "transformers_version": "4.21.3", "typical_p": 1.0, "use_bfloat16": False,
}  # fmt: skip
CLIP_L_336 = {
    "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
    "projection_dim": 768, "text_config": {"model_type": "clip_text_model", "hidden_size": 768},
    "text_config_dict": {"hidden_size": 768, "num_hidden_layers": 12}, "torch_dtype": "float32",
    "vision_config": OF_EVERY_MODEL | {
        "attention_dropout": 0.0, "dropout": 0.0, "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
        "initializer_factor": 1.0, "initializer_range": 0.02, "intermediate_size": 4096, "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model", "num_attention_heads": 16, "num_channels": 3, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    },
    "vision_config_dict": {
        "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (MIXTRAL_8X7B, DecoderConfig()),
        (MIXTRAL_8X7B | {"transformers_version": "4.36.0"}, DecoderConfig()),  # instruct
        (MIXTRAL_8X22B, M8X22B),
        (MIXTRAL_8X22B | {"vocab_size": 32768}, dataclasses.replace(M8X22B, vocab_size=32768)),  # instruct
    ],
)
def test_published_mixtrals_are_understood(attributes: dict[str, Any], expected: DecoderConfig):
    assert huggingface.decoder_config(attributes, where=Path("config.json")) == expected


def test_the_published_clip_is_understood():
    assert huggingface.vision_config(CLIP_L_336, where=Path("config.json"), feature_layer=-2) == VisionConfig()
    # As a LLaVA writes it: what every CLIP has in common is left out.
    brief = {"model_type": "clip", "vision_config": CLIP_L_336["vision_config_dict"]}
    assert huggingface.vision_config(brief, where=Path("config.json"), feature_layer=-2) == VisionConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("num_channels", 1),
        ("use_head", True),
        ("pruned_heads", {"0": [1]}),
        ("hidden_size", 1030),
        ("layer_norm_eps", 0),
        ("vision_config_dict", {"patch_size": 16}),
    ],
)
def test_a_tower_that_cannot_be_honoured_is_refused_by_name(name: str, value: Any):
    if name == "vision_config_dict":
        changed, said = CLIP_L_336 | {name: value}, "vision_config_dict.patch_size"
    else:
        changed, said = CLIP_L_336 | {"vision_config": CLIP_L_336["vision_config"] | {name: value}}, name
        changed["vision_config_dict"] = None
    with pytest.raises(MoextendError, match=said):
        huggingface.vision_config(changed, where=Path("config.json"), feature_layer=-2)


@pytest.mark.parametrize("model_type", ["siglip2", "siglip2_vision_model"])
def test_siglip_for_any_shape_is_refused_by_name(model_type: str):
    with pytest.raises(MoextendError, match="NaFlex.* is not supported, that of one size says siglip"):
        huggingface.vision_config({"model_type": model_type}, where=Path("config.json"), feature_layer=-2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "4096"),
        ("num_hidden_layers", -1),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 5),
        ("num_experts_per_tok", 9),
        ("rope_theta", float("nan")),
        ("vocab_size", True),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6, "factor": 2.0}),
    ],
)
def test_impossible_sizes_are_refused_by_name(name: str, value: Any):
    with pytest.raises(MoextendError, match=name):
        huggingface.decoder_config(MIXTRAL_8X7B | {name: value}, where=Path("config.json"))


def test_attributes_round_trip():
    config = with_vision(tiny.EXTENDED, tiny.VISION, tags=ImageTags(start=50, end=51, pad=52))
    attributes = json.loads(json.dumps(released_attributes(config, dtype="float32")))
    where = Path("config.json")
    assert huggingface.decoder_config(attributes, where=where) == config.decoder
    assert huggingface.vision_config(attributes["vision_config"], where=where, feature_layer=-1) == config.vision
    extension = released.extension_config(attributes, where=where)
    assert extension and extension.layers == tiny.EXTENSION.layers
    assert released.image_tags(attributes) == config.tags


@pytest.mark.parametrize("layers", [[2, 1], [1, 1], "1", [0.5], [-1]])
def test_a_strange_list_of_extended_layers_is_refused(layers: Any):
    with pytest.raises(MoextendError, match="add_layer"):
        released.extension_config(MIXTRAL_8X7B | {"add_layer": layers}, where=Path("config.json"))


def test_extended_layers_beyond_the_model_are_refused():
    with pytest.raises(MoextendError, match=r"layers \[32\], but the model has only 32"):
        released.extension_config(MIXTRAL_8X7B | {"add_layer": [3, 32]}, where=Path("config.json"))


# --- transformers' own classes ----------------------------------------------------------------------------------------


def test_transformers_and_we_read_each_other_s_files_and_agree(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = tiny.DECODER
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.width,
            intermediate_size=sizes.hidden,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            head_dim=sizes.head_size,
            num_local_experts=sizes.experts,
            num_experts_per_tok=sizes.top_k,
            initializer_range=0.3,
        )
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    decoder = huggingface.read_decoder_config(tmp_path / "theirs")
    assert dataclasses.replace(decoder, rope_theta=sizes.rope_theta) == sizes
    config = ModelConfig(decoder=decoder, dtype="float32", remat="none")
    model = tiny.structure(config)
    arrays = huggingface.read_parameters(tmp_path / "theirs", table="mixtral", config=config)
    arrays = {path: jnp.asarray(leaf) for path, leaf in arrays.items()}

    batch = tiny.batch()._replace(features={})
    batch = batch._replace(places_BL=np.full_like(batch.places_BL, -1))

    @jax.jit
    def logits_of(arrays: dict[str, jax.Array]):
        whole = with_arrays(model, arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    def their_logits(model) -> np.ndarray:
        with torch.no_grad():
            mask = torch.tensor(batch.segments_BL)
            return model(torch.tensor(batch.ids_BL, dtype=torch.long), attention_mask=mask).logits.numpy()

    real_BL = batch.segments_BL > 0
    ours = np.asarray(logits_of(arrays))
    np.testing.assert_allclose(ours[real_BL], their_logits(theirs)[real_BL], atol=1e-4, rtol=0)

    huggingface.write_parameters(tmp_path / "ours", arrays, table="mixtral", config=config)
    huggingface.write_decoder_config(tmp_path / "ours", decoder, dtype="float32")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    np.testing.assert_array_equal(their_logits(again), their_logits(theirs))
    assert isinstance(model, nnx.Module)
