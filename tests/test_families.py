"""The table of families: what the docs say of it, and what an attribute that a family cannot honour gives."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dump_torch
import test_export_families
import test_names
import test_router
import test_sharded
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.config import IGNORE, Batch, DecoderConfig, ModelConfig, MoextendError
from moextend_jax.families import FAMILIES
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend, abstract
from moextend_jax.models.router import Rule, route
from moextend_jax.parameters import arrays_of, with_arrays
from moextend_jax.plan.sizes import DECODERS

SMALL = {
    "vocab_size": 61, "width": 24, "hidden": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_size": 6, "experts": 4,
    "top_k": 2,
}  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs" / "families.md"


MIXTRALS = test_names.M8X7B, test_names.M8X22B, test_names.M8X22B_INSTRUCT
MATCHED = [*(DECODERS[name] for name in (*test_names.OTHERS, *test_names.FUSED)), *MIXTRALS]


def rows() -> list[str]:
    """The docs' table; in bold, models of whose sizes `test_names` matches every tensor."""
    lines = []
    for name, family in FAMILIES.items():
        fields = ", ".join(f"`{field} = {value}`" for field, value in family.fields.items()) or "none"
        models = ", ".join(f"**{model}**" if DECODERS[model] in MATCHED else model for model in family.published)
        template = f"`{family.template}`" if family.template else "none"
        lines.append(f"| `{name}` | {family.architecture} | {fields} | {template} | {models} |")
    return lines


def checked() -> list[str]:
    """The docs' second table: what tests compare of each family, from their own lists of cases."""
    lines = []
    for name, family in FAMILIES.items():
        cases = [case for case in test_export_families.CASES.values() if case[0] == name]
        towers, starts = (dict.fromkeys(case[part] for case in cases if case[part]) for part in (1, 2))
        one, several = ([start for start in starts if start in of]
                        for of in (test_export_families.STARTS, test_export_families.CHAINS))  # fmt: skip
        matched = sum(DECODERS[model] in MATCHED for model in family.published)
        columns = (
            f"{matched} of {len(family.published)}",
            *(", ".join(part) or "none" for part in (towers, one, several)),
        )
        lines.append(f"| `{name}` | {' | '.join(columns)} |")
    return lines


def test_the_docs_have_the_tables():
    written = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    header, further = written[0], [line for line in written if line.startswith("| `model_type`")][1:]
    assert header.startswith("| `model_type`") and len(further) == 1
    assert [line for line in written if line not in (header, *further)] == [*rows(), *checked()]
    # What the page says of every family.
    assert {"mixtral", *test_dump_torch.OTHERS} == {*FAMILIES}
    assert families_of(test_router.test_copies_change_those_tokens_alone_that_chose_a_source) == {*FAMILIES}
    assert {"mixtral"} | families_of(test_sharded.test_so_it_is_in_other_families) == {*FAMILIES}


def families_of(test: Callable[..., None]) -> set[str]:
    """What a test is run with as `family`."""
    marks: list[pytest.Mark] = getattr(test, "pytestmark")  # noqa: B009 (no type knows it)
    cases = next(mark.args[1] for mark in marks if mark.name == "parametrize" and mark.args[0] == "family")
    return {getattr(case, "values", (case,))[0] for case in cases}


@pytest.mark.parametrize("name", DECODERS)
def test_sizes_are_written_and_read_again(name: str, tmp_path: Path):
    decoder = DECODERS[name]
    huggingface.write_decoder_config(tmp_path, decoder, dtype="bfloat16")
    assert huggingface.read_decoder_config(tmp_path) == decoder
    (tmp_path / "config.json").write_text(
        json.dumps(huggingface.read_json(tmp_path / "config.json") | {"hidden_act": "gelu"})
    )
    with pytest.raises(MoextendError, match="hidden_act = 'gelu' cannot be honoured"):
        huggingface.read_decoder_config(tmp_path)


def test_what_is_not_written_is_what_transformers_takes(tmp_path: Path):
    """Its class renormalises only where the file says so, whatever published files say."""
    huggingface.write_decoder_config(tmp_path, DECODERS["Qwen3-30B-A3B"], dtype="bfloat16")
    attributes = huggingface.read_json(tmp_path / "config.json")
    for name, value in (("norm_topk_prob", False), ("tie_word_embeddings", False)):
        del attributes[name]
        assert getattr(read(tmp_path, attributes), {"norm_topk_prob": "normalised"}.get(name, "tied_head")) is value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_local_experts": 64}, "num_local_experts and num_experts differ"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size = 5 cannot be honoured"),
        ({"use_qk_norm": False}, "use_qk_norm = False cannot be honoured"),
        ({"model_type": "qwen3_next"}, "model_type is 'qwen3_next', expected one of"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict, message: str, tmp_path: Path):
    huggingface.write_decoder_config(tmp_path, DECODERS["Qwen3-30B-A3B"], dtype="bfloat16")
    attributes = huggingface.read_json(tmp_path / "config.json")
    with pytest.raises(MoextendError, match=message):
        read(tmp_path, attributes | change)


def test_gpt_oss_has_plain_positions_only_where_its_file_says_so(tmp_path: Path):
    """Where it is silent, transformers takes YaRN's of factor 32."""
    plain = dataclasses.replace(DECODERS["gpt-oss-20b"], rope_scaling=None)
    huggingface.write_decoder_config(tmp_path, plain, dtype="bfloat16")
    attributes = huggingface.read_json(tmp_path / "config.json")
    assert read(tmp_path, attributes) == plain
    rope = {"rope_type": "default", "rope_theta": attributes.pop("rope_theta")}
    del attributes["rope_scaling"]
    assert read(tmp_path, attributes | {"rope_parameters": rope}) == plain
    for silent in ({}, {"rope_scaling": None}):
        with pytest.raises(MoextendError, match="nothing of rotary positions, where transformers takes YaRN's"):
            read(tmp_path, attributes | silent | {"rope_theta": 1.5e5})
    config = AutoConfig.for_model("gpt_oss", rope_scaling={"rope_type": "default"}, rope_theta=1.5e5)
    assert config.rope_parameters["rope_type"] == "default"


def test_a_gpt_oss_whose_file_says_no_size_of_heads_is_refused(tmp_path: Path):
    """Its class takes 64 then, whatever the width: an even share of it would be another model."""
    huggingface.write_decoder_config(tmp_path, DECODERS["gpt-oss-20b"], dtype="bfloat16")
    attributes = huggingface.read_json(tmp_path / "config.json")
    del attributes["head_dim"]
    with pytest.raises(MoextendError, match="head_dim must be one positive number, not None"):
        read(tmp_path, attributes)


def read(folder: Path, attributes: dict) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(attributes))
    return huggingface.read_decoder_config(folder)


def tiny_arrays(decoder: DecoderConfig) -> tuple[ModelConfig, dict]:
    config = ModelConfig(decoder=decoder)
    model = MoExtend(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    return config, {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in arrays_of(model).items()}


def test_experts_that_transformers_5_has_fused_are_read_one_by_one(tmp_path: Path):
    """`save_pretrained(save_original_format=False)` of any family: [E, 2F, D] and [E, D, F]."""
    decoder = dataclasses.replace(DECODERS["Qwen3-30B-A3B"], **SMALL)
    config, arrays = tiny_arrays(decoder)
    huggingface.write_decoder_config(tmp_path, decoder, dtype="float32")
    huggingface.write_parameters(tmp_path, arrays, table="qwen3_moe", config=config)
    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    for z in range(decoder.layers):
        experts = f"model.layers.{z}.mlp.experts."
        gate, up, down = (
            [tensors.pop(f"{experts}{e}.{part}_proj.weight") for e in range(decoder.experts)]
            for part in ("gate", "up", "down")
        )
        tensors[experts + "gate_up_proj"] = np.concatenate([np.stack(gate), np.stack(up)], axis=1)
        tensors[experts + "down_proj"] = np.stack(down)
    save_file(tensors, file)
    opened = open_checkpoint(tmp_path)
    assert opened.arrays.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(opened.arrays[path], array, err_msg=path)


@pytest.mark.parametrize(
    "name",
    [name if name in ("granitemoe", "ernie4_5_moe") else pytest.param(name, marks=pytest.mark.slow)
     for name in FAMILIES],
)  # fmt: skip
def test_what_transformers_5_holds_in_memory_is_read(name: str, tmp_path: Path):
    """The real thing, of every family: the same arrays as from its published names."""
    pytest.importorskip("torch", reason="transformers' models need torch (the extra `torch`)")
    family = next(iter(FAMILIES[name].published))
    published = DECODERS[family]
    small = {**SMALL, "shared_experts": 1, "dense_hidden": 20, "shared_hidden": 12, "dense_layers": 1, "groups": 1}
    if published.heads * published.head_size != published.width:  # transformers' OLMoE has no other size of a head
        small["head_size"] = 8  # half of a head may be turned
    has = {field: value for field, value in small.items() if field in SMALL or getattr(published, field)}
    decoder = dataclasses.replace(published, **has, **({"local": published.local[:2]} if published.local else {}))
    config, arrays = tiny_arrays(decoder)
    huggingface.write_decoder_config(tmp_path, decoder, dtype="float32")
    huggingface.write_parameters(tmp_path, arrays, table=name, config=config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    model.save_pretrained(tmp_path / "memory", save_original_format=False)
    opened = open_checkpoint(tmp_path / "memory").arrays
    assert opened.keys() == arrays.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(opened[path], array, err_msg=path)


def test_of_published_files_layers_that_predict_further_tokens_are_not_read(tmp_path: Path):
    """ERNIE's stand beside the layers, under names of their own."""
    config, arrays = tiny_arrays(dataclasses.replace(DECODERS["ERNIE-4.5-21B-A3B-PT"], **SMALL, dense_hidden=20))
    huggingface.write_decoder_config(tmp_path, config.decoder, dtype="float32")
    huggingface.write_parameters(tmp_path, arrays, table="ernie4_5_moe", config=config)
    attributes = huggingface.read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(attributes | {"num_nextn_predict_layers": 1}))
    (file,) = tmp_path.glob("*.safetensors")
    more = ("mtp_block.0.input_layernorm", "mtp_emb_norm.0", "mtp_hidden_norm.0", "mtp_linear_proj.0")
    save_file(load_file(file) | {f"model.{part}.weight": np.ones(3, np.float32) for part in more}, file)
    assert open_checkpoint(tmp_path).arrays.keys() == arrays.keys()


def test_a_router_in_float32_stays_so_in_a_model_of_bfloat16(tmp_path: Path):
    """ERNIE's, whose files have it so."""
    decoder = dataclasses.replace(DECODERS["ERNIE-4.5-21B-A3B-PT"], **SMALL, dense_hidden=20)
    config, arrays = tiny_arrays(decoder)
    huggingface.write_decoder_config(tmp_path, decoder, dtype="float32")
    huggingface.write_parameters(tmp_path, arrays, table="ernie4_5_moe", config=config)
    opened = open_checkpoint(tmp_path, dtype="bfloat16")
    gate_ZDE = opened.arrays["decoder/layers/moe/gate"]
    np.testing.assert_array_equal(gate_ZDE, arrays["decoder/layers/moe/gate"])
    assert opened.arrays["decoder/layers/attention/query"].dtype == jnp.bfloat16
    rule = Rule.of(opened.config.decoder)
    x_TD = jax.random.normal(jax.random.key(0), (50, SMALL["width"]), jnp.bfloat16)
    logits_TE = route(x_TD, gate_ZDE[0], rule=rule).logits_TO
    exact_TE = np.asarray(x_TD, np.float64) @ np.asarray(gate_ZDE[0], np.float64)
    np.testing.assert_allclose(logits_TE, exact_TE, atol=1e-6)
    rounded_TE = route(x_TD, gate_ZDE[0], rule=rule._replace(router_float32=False)).logits_TO
    assert np.abs(rounded_TE - exact_TE).max() > 1e-4


@pytest.mark.slow
def test_a_window_counts_tokens_and_not_places_of_a_cache():
    """Rows of several lengths lie padded in it: what each says is what it says alone."""
    local = {"local": (True, False), "local_window": 3, "sinks": True}
    config, arrays = tiny_arrays(DecoderConfig(**SMALL, **local))
    generator = Generator(abstract(config), eos=-1)
    ids = np.random.default_rng(0).integers(7, 60, (2, 9)).astype(np.int32)

    def rows(ids_BL: np.ndarray, lengths: list[int]) -> Batch:
        place_BL = np.broadcast_to(np.arange(ids_BL.shape[1], dtype=np.int32), ids_BL.shape)
        segments_BL = (place_BL < np.array(lengths)[:, None]).astype(np.int32)
        labels_BL, places_BL = np.full_like(ids_BL, IGNORE), np.full_like(ids_BL, -1)
        return jax.tree.map(jnp.asarray, Batch(ids_BL, labels_BL, place_BL * segments_BL, segments_BL, places_BL))

    both = tiny.complete(generator, arrays, rows(ids, [9, 5]), max_new_tokens=6)
    alone = tiny.complete(generator, arrays, rows(ids[1:, :5], [5]), max_new_tokens=6)
    np.testing.assert_array_equal(both[1:], alone)
    whole = np.concatenate([ids[1:, :5], alone], axis=1)
    model = with_arrays(abstract(config), jax.tree.map(jnp.asarray, arrays))
    logits_BLV = model.decoder.logits(model(rows(whole, [11])).hidden_BLD)
    np.testing.assert_array_equal(np.argmax(logits_BLV[:, 4:-1], axis=-1), alone)
