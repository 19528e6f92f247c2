"""Sparse upcycling: the Mixtral computes what the dense model did, noise is seeded, refusals have names."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny_llama as llama
from transformers import LlamaConfig

from moextend_jax.checkpoints import convert, leaves, names
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.llama import llama_config
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.source import open_source
from moextend_jax.checkpoints.tensors import Stored, open_safetensors
from moextend_jax.checkpoints.upcycle import open_upcycled, upcycle, upcycled_config
from moextend_jax.config import DecoderConfig, ModelConfig, MoextendError

MIXTURE = upcycled_config(llama.DENSE, experts=4, top_k=2)
IDS_BL = np.random.default_rng(1).integers(0, llama.DENSE.vocab_size, (2, 20))
EXPERT = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
GATE = "model.layers.{}.block_sparse_moe.gate.weight"


def logits(source: dict[str, Stored], config: DecoderConfig) -> np.ndarray:
    return llama.logits(llama.load(source, config), config, IDS_BL)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict[str, Stored]:
    return open_safetensors(llama.write_folder(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def dense_logits(source: dict[str, Stored]) -> np.ndarray:
    return logits(upcycle(source, experts=1), llama.DENSE)


@pytest.mark.parametrize(("experts", "top_k", "seed"), [(4, 2, 0), (4, 2, 1), (3, 3, 0), (4, 1, 5)])
def test_under_any_router_the_mixture_computes_what_the_dense_model_does(
    source: dict[str, Stored], dense_logits: np.ndarray, experts: int, top_k: int, seed: int
):
    config = upcycled_config(llama.DENSE, experts=experts, top_k=top_k)
    mixture = upcycle(source, experts=experts, seed=seed)
    np.testing.assert_allclose(logits(mixture, config), dense_logits, atol=1e-5)


def test_the_dense_model_is_transformers_llama(tmp_path: Path, dense_logits: np.ndarray):
    torch = pytest.importorskip("torch", reason="the reference needs the torch extra")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama.write_folder(tmp_path), dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS_BL)).logits.numpy()
    np.testing.assert_allclose(dense_logits, theirs, atol=1e-4)


def test_the_names_are_those_of_a_mixtral_and_nothing_is_read():
    config = DecoderConfig(experts=1, top_k=1)
    made = {name: (1, 1) for name in llama.tensors(dataclasses.replace(llama.DENSE, layers=config.layers))}
    unread = {name: Stored(shape, np.dtype(np.float32), lambda: 1 / 0, "") for name, shape in made.items()}  # pyright: ignore[reportArgumentType]
    mixture = upcycled_config(config, experts=8, top_k=2)
    wanted = {tensor.file for tensor in names.tensors("mixtral", ModelConfig(decoder=mixture))}
    assert upcycle(unread, experts=8, noise=0.1).keys() == wanted


def test_without_noise_every_expert_is_the_dense_ffn_to_the_bit(source: dict[str, Stored]):
    mixture = upcycle(source, experts=4)
    for theirs, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items():
        dense = source[f"model.layers.1.mlp.{ours}_proj.weight"].read()
        for expert in range(4):
            assert mixture[EXPERT.format(1, expert, theirs)].read().tobytes() == dense.tobytes()


def test_noise_makes_experts_differ_by_what_was_asked_for(source: dict[str, Stored]):
    mixture = upcycle(source, experts=4, noise=0.1)
    dense = source["model.layers.2.mlp.up_proj.weight"].read()
    copies = [mixture[EXPERT.format(2, expert, "w3")].read() for expert in range(4)]
    for copy in copies:
        relative = np.sqrt(np.mean((copy - dense) ** 2) / np.mean(dense**2))
        assert relative == pytest.approx(0.1, rel=0.1)
    noises = np.stack([(copy - dense).ravel() for copy in copies])
    assert np.abs(np.corrcoef(noises) - np.eye(4)).max() < 0.1  # 2048 draws each
    config = ModelConfig(decoder=upcycled_config(llama.DENSE, experts=4, top_k=2))
    written = leaves.match(mixture, table="mixtral", config=config, where=Path("llama"))
    for expert, copy in enumerate(copies):  # what an import writes, which reads files in pieces
        up = written["decoder/layers/moe/experts/w_up"].theirs((2, expert))
        np.testing.assert_array_equal(up, copy)


def test_noise_and_routers_come_from_the_seed_alone(source: dict[str, Stored]):
    name = EXPERT.format(0, 3, "w2")
    one, again, other = (upcycle(source, experts=4, noise=0.1, seed=seed) for seed in (7, 7, 8))
    few = upcycle(dict(reversed(source.items())), experts=4, noise=0.1, seed=7)
    assert one[name].read().tobytes() == again[name].read().tobytes() == one[name].read().tobytes()
    assert few[name].read().tobytes() == one[name].read().tobytes()
    for drawn in (name, GATE.format(0)):
        assert not np.array_equal(one[drawn].read(), other[drawn].read())
    assert one[GATE.format(0)].read().tobytes() == again[GATE.format(0)].read().tobytes()
    assert not np.array_equal(one[GATE.format(0)].read(), one[GATE.format(1)].read())


def test_tokens_spread_over_all_experts(source: dict[str, Stored]):
    gate_ED = upcycle(source, experts=4)[GATE.format(0)].read()
    x_TD = np.random.default_rng(0).normal(size=(400, gate_ED.shape[1]))
    picks = np.argsort(x_TD @ gate_ED.T, axis=1)[:, -2:]
    assert np.bincount(picks.ravel(), minlength=4).min() > 50


def test_half_precision_stays_half_precision(source: dict[str, Stored]):
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    half = {name: array.read().astype(bfloat16) for name, array in source.items()}
    for stored in upcycle(llama.stored(half), experts=2, noise=0.01).values():
        array = stored.read()
        assert stored.dtype == array.dtype == bfloat16
        assert stored.shape == array.shape


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_more_experts_per_token_than_there_are_is_refused():
    with pytest.raises(MoextendError, match="4 experts each token cannot take 5"):
        upcycled_config(llama.DENSE, experts=4, top_k=5)


def test_a_mixture_and_a_model_with_a_matrix_missing_are_refused(source: dict[str, Stored]):
    with pytest.raises(MoextendError, match=r"mixture of experts already.*block_sparse_moe"):
        upcycle(upcycle(source, experts=2), experts=4)
    part = {name: array for name, array in source.items() if name != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(MoextendError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        upcycle(part, experts=4)
    with pytest.raises(MoextendError, match="nothing to upcycle"):
        upcycle({}, experts=4)


# --- config.json ------------------------------------------------------------------------------------------------------


def config_folder(folder: Path, **changes: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(llama.attributes(**changes)))
    return folder


def sizes_of(folder: Path) -> DecoderConfig:
    return llama_config(read_json(folder / "config.json"), where=folder / "config.json")


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({}, {}),
        ({"head_dim": None}, {}),
        ({"head_dim": 16}, {"head_size": 16}),
        ({"num_key_value_heads": ...}, {"kv_heads": 4}),
        ({"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"model_type": "mistral", "sliding_window": None}, {}),
        ({"model_type": "mistral", "sliding_window": 2048}, {"window": 2048}),
        ({"model_type": "mistral"}, {"window": 4096}),
        ({"tie_word_embeddings": True}, {"tied_head": True}),
        # what SmolLM2 writes
        ({"rope_interleaved": False, "is_llama_config": True, "pretraining_tp": 1, "transformers.js_config": {}}, {}),
    ],
)
def test_sizes_are_read(tmp_path: Path, changes: dict[str, Any], differs: dict[str, Any]):
    assert sizes_of(config_folder(tmp_path, **changes)) == dataclasses.replace(llama.DENSE, **differs)


def test_what_transformers_writes_is_read(tmp_path: Path):
    theirs = {k: v for k, v in llama.attributes().items() if k not in ("model_type", "rope_theta", "rope_scaling")}
    LlamaConfig(**theirs, rope_parameters={"rope_type": "default", "rope_theta": 1e4}).save_pretrained(tmp_path)
    assert sizes_of(tmp_path) == llama.DENSE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'; only llama and mistral"),
        ({"sliding_window": "4096"}, "sliding_window must be null or one positive number, not '4096'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling = .*dynamic.* cannot be honoured"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters = .*llama3"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' .*'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config: weights quantised by .gptq. are not"),
        ({"hidden_size": ...}, "hidden_size must be one positive number, not None"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be one positive number, not '3'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be one positive number"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(MoextendError, match=said) as error:
        sizes_of(config_folder(tmp_path, **changes))
    assert "config.json" in str(error.value)


def test_a_folder_without_or_with_a_broken_config_is_refused(tmp_path: Path):
    with pytest.raises(MoextendError, match="does not exist"):
        sizes_of(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(MoextendError, match="config.json"):
            sizes_of(tmp_path)


# --- from files to an imported folder ---------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "file"])
def imported(request, tmp_path: Path) -> Path:
    """A dense model, from a folder and from a GGUF file without a tokenizer, as `moextend import` leaves it."""
    if request.param == "folder":
        path = llama.write_folder(tmp_path / "dense", eos_token_id=[2, 3])
        (path / "tokenizer_config.json").write_text("{}")
    else:
        path = llama.write_gguf(tmp_path / "m.gguf", keys={"attention.key_length": 8})
    opened = open_upcycled(path, experts=4, top_k=2, seed=3, tokenizer_folder=tmp_path / "tokenizer")
    convert.import_source(opened, tmp_path / "imported")
    return tmp_path / "imported"


def test_what_is_imported_is_the_mixture(imported: Path, dense_logits: np.ndarray):
    again = open_checkpoint(imported)
    assert again.config.decoder == MIXTURE
    np.testing.assert_allclose(llama.logits(again.arrays, MIXTURE, IDS_BL), dense_logits, atol=1e-5)
    facts = json.loads((imported / "moextend.json").read_text())["facts"]
    assert facts["upcycled"] == {"from": facts["upcycled"]["from"], "experts": 4, "noise": 0.0, "seed": 3}
    if facts["upcycled"]["from"] == "dense":
        assert (imported / "tokenizer_config.json").read_text() == "{}"
    else:
        assert facts["tokenizer"].startswith("not written: the GGUF's tokenizer is None")


def test_exported_again_it_is_transformers_mixtral(imported: Path, dense_logits: np.ndarray, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="the reference needs the torch extra")
    from transformers import MixtralForCausalLM

    convert.export_source(open_source(imported), tmp_path / "hf", layout="mixtral", max_shard_bytes=1 << 30)
    eos = json.loads((tmp_path / "hf" / "config.json").read_text())["eos_token_id"]
    assert eos == ([2, 3] if (tmp_path / "dense").exists() else 2)
    with torch.no_grad():
        theirs = MixtralForCausalLM.from_pretrained(tmp_path / "hf")(torch.from_numpy(IDS_BL)).logits.numpy()
    np.testing.assert_allclose(theirs, dense_logits, atol=1e-4)


def test_a_path_that_is_no_model_is_refused(tmp_path: Path):
    (tmp_path / "weights.bin").write_bytes(b"")
    for path in (tmp_path / "weights.bin", tmp_path / "absent"):
        with pytest.raises(MoextendError, match="neither a Hugging Face model folder nor a .gguf file"):
            open_upcycled(path, experts=4, tokenizer_folder=tmp_path)
    with pytest.raises(MoextendError, match="config.json does not exist"):
        open_upcycled(tmp_path, experts=4, tokenizer_folder=tmp_path)


def test_an_embedding_that_stands_twice_in_a_tied_model_is_taken_once(tmp_path: Path):
    path = llama.write_folder(tmp_path / "dense", tie_word_embeddings=True)  # its file has a head all the same
    opened = open_upcycled(path, experts=2, tokenizer_folder=tmp_path)
    assert opened.config.decoder.tied_head
    assert "decoder/head" not in opened.leaves
