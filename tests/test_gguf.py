"""GGUF: the same tensors as the Hugging Face folder, tokenizers that give the same ids, refusals with names."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tiny
import tiny_llama as llama
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from moextend_jax import cli
from moextend_jax.checkpoints.gguf import open_gguf
from moextend_jax.checkpoints.gguf_tokenizer import write_tokenizer
from moextend_jax.checkpoints.upcycle import upcycle, upcycled_config
from moextend_jax.config import ImageTags, Llama3RopeConfig, MoextendError
from moextend_jax.data.tokenizer import load_tokenizer

KEPT = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("kind", KEPT)
def test_unquantised_tensors_are_the_folders_to_the_bit(tmp_path: Path, kind: str):
    opened = open_gguf(llama.write_gguf(tmp_path / "m.gguf", kinds=lambda name: kind))
    assert opened.config == llama.DENSE
    wanted = llama.tensors()
    assert opened.tensors.keys() == wanted.keys()
    for name, array in wanted.items():
        stored, dtype = opened.tensors[name], np.dtype(KEPT[kind] if array.ndim > 1 else np.float32)
        read = stored.read()
        assert stored.dtype == read.dtype == dtype
        assert stored.shape == read.shape
        assert read.tobytes() == array.astype(dtype).tobytes(), name


# Greatest error of an element in units of its block's largest: half a step of the grid, and float16 scales.
@pytest.mark.parametrize(("kind", "step"), [("Q8_0", 1 / 127), ("Q5_0", 1 / 16), ("Q4_0", 1 / 8), ("Q4_1", 2 / 15)])
def test_quantised_tensors_are_the_folders_to_the_step_of_their_grid(tmp_path: Path, kind: str, step: float):
    opened = open_gguf(llama.write_gguf(tmp_path / "m.gguf", kinds=lambda name: kind))
    for name, array in llama.tensors().items():
        read = opened.tensors[name].read()
        assert read.dtype == opened.tensors[name].dtype == np.float32
        if array.ndim == 1:
            assert read.tobytes() == array.tobytes()
            continue
        difference, largest = (np.abs(x).reshape(-1, 32).max(axis=1) for x in (read - array, array))
        assert (difference <= step * largest * 1.01).all(), name


def test_layers_of_different_types_have_one_in_common(tmp_path: Path):
    path = llama.write_gguf(tmp_path / "m.gguf", kinds=lambda name: "Q8_0" if name == "blk.1.attn_v.weight" else "F16")
    opened = open_gguf(path)
    for layer in range(llama.DENSE.layers):
        stored = opened.tensors[f"model.layers.{layer}.self_attn.v_proj.weight"]
        assert stored.dtype == stored.read().dtype == np.float32
    assert opened.tensors["model.layers.1.self_attn.k_proj.weight"].dtype == np.float16


def test_a_tied_head_is_not_in_the_file(tmp_path: Path):
    config = dataclasses.replace(llama.DENSE, tied_head=True)
    opened = open_gguf(llama.write_gguf(tmp_path / "m.gguf", config=config))
    assert opened.config == config
    assert "lm_head.weight" not in opened.tensors


def test_the_scaling_of_a_llama_3_is_known_by_what_its_file_divides_frequencies_by(tmp_path: Path):
    """Its pairs turn 1304, 49, 1.84 and 0.07 times within 8192 positions: the third is between 1 and 4."""
    config = dataclasses.replace(llama.DENSE, rope_theta=5e5)
    kept = (8192 * 5e5**-0.5 / (2 * np.pi) - 1) / (4 - 1)
    divisors_h = np.array([1, 1, 1 / ((1 - kept) / 32 + kept), 32], np.float32)  # as llama.cpp's converter writes them
    opened = open_gguf(llama.write_gguf(tmp_path / "m.gguf", config=config, extra={"rope_freqs.weight": divisors_h}))
    scaling = Llama3RopeConfig(factor=32.0, length=8192, low=1.0, high=4.0)
    assert opened.config == dataclasses.replace(config, rope_scaling=scaling)
    assert "rope_freqs.weight" not in opened.tensors and len(opened.tensors) == len(llama.tensors())


def test_a_file_becomes_a_mixture_of_experts(tmp_path: Path):
    source = open_gguf(llama.write_gguf(tmp_path / "m.gguf", kinds=lambda name: "Q4_1")).tensors
    ids_BL = np.random.default_rng(1).integers(0, llama.DENSE.vocab_size, (2, 12))
    mixture = upcycled_config(llama.DENSE, experts=4, top_k=2)
    dense = llama.logits(llama.load(upcycle(source, experts=1), llama.DENSE), llama.DENSE, ids_BL)
    mixed = llama.logits(llama.load(upcycle(source, experts=4), mixture), mixture, ids_BL)
    np.testing.assert_allclose(mixed, dense, atol=1e-5)


# --- mistakes ---------------------------------------------------------------------------------------------------------

VECTOR = np.ones(llama.DENSE.width, np.float32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "gemma"}, "architecture is 'gemma'; only \"llama\""),
        ({"keys": {"rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = 'yarn' cannot be honoured"),
        ({"keys": {"rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor = 4.0 cannot"),
        ({"keys": {"expert_count": 8}}, "is a mixture of 8 experts, and as GGUF only dense models"),
        ({"keys": {"attention.sliding_window": 4096}}, "llama.attention.sliding_window is unknown"),
        ({"keys": {"rope.dimension_count": 4}}, "llama.rope.dimension_count = 4 is not the head size 8"),
        ({"keys": {"attention.value_length": 16}}, "llama.attention.value_length = 16"),
        ({"keys": {"attention.head_count": [4, 4, 2]}}, r"llama.attention.head_count must be one .*\[4, 4, 2\]"),
        ({"keys": {"attention.head_count": 0}}, "llama.attention.head_count must be one positive number, not 0"),
        ({"keys": {"embedding_length": None}}, "llama.embedding_length must be one positive number, not None"),
        ({"keys": {"block_count": 4}}, r"Missing: blk\.3\.attn_k\.weight"),
        ({"keys": {"feed_forward_length": 96}}, r"ffn_gate\.weight has shape \[64, 32\], expected \[96, 32\]"),
        ({"extra": {"rope_freqs.weight": VECTOR}}, "rope_freqs.weight scales rotary .*: import the .* safetensors"),
        ({"extra": {"rope_freqs.weight": 8 * VECTOR[:4]}}, "rope_freqs.weight scales rotary"),
        ({"extra": {"rope_freqs.weight": np.nan * VECTOR[:4]}}, "rope_freqs.weight scales rotary"),
        ({"extra": {"blk.0.attn_q.bias": VECTOR}}, r"Not asked for: blk\.0\.attn_q\.bias"),
        ({"left_out": "blk.2.ffn_norm.weight"}, r"Missing: blk\.2\.ffn_norm\.weight"),
        ({"left_out": "token_embd.weight"}, "missing: token_embd.weight"),
        ({"kinds": lambda name: "F64"}, "token_embd.weight is of type F64"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(MoextendError, match=said) as error:
        open_gguf(llama.write_gguf(tmp_path / "m.gguf", **changes))
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize("options", [[], ["--experts=4"]])
def test_a_mixture_is_not_called_a_dense_model(tmp_path: Path, options: list[str]):
    mixture = llama.write_gguf(tmp_path / "m.gguf", keys={"expert_count": 8, "expert_used_count": 2})
    with pytest.raises(MoextendError, match="is a mixture of 8 experts, and as GGUF only dense models are read"):
        cli.call(["import", str(mixture), str(tmp_path / "out"), *options])
    dense = llama.write_gguf(tmp_path / "d.gguf")
    with pytest.raises(MoextendError, match="is a dense model: give --experts N"):
        cli.call(["import", str(dense), str(tmp_path / "out")])


def test_another_format_an_empty_file_and_none_are_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    with pytest.raises(MoextendError, match="m.gguf does not exist"):
        open_gguf(path)
    for content in (b"", b"GG", b"not a GGUF file at all, only some text", b"GGUF" + bytes(60)):
        path.write_bytes(content)
        with pytest.raises(MoextendError, match="m.gguf cannot be read as GGUF"):
            open_gguf(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path):
    path = llama.write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for length in [*range(4, 600, 7), *np.linspace(600, len(whole) - 1, 40, dtype=int)]:
        path.write_bytes(whole[:length])
        with pytest.raises(MoextendError, match="cut short"):
            open_gguf(path)


def test_wrong_bytes_are_refused_or_harmless(tmp_path: Path):
    path = llama.write_gguf(tmp_path / "m.gguf")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        bad = bytearray(whole)
        bad[rng.integers(2600)] = rng.integers(256)
        path.write_bytes(bad)
        try:
            for stored in open_gguf(path).tensors.values():
                assert stored.read().shape == stored.shape
        except MoextendError:
            refused += 1
    assert 20 < refused < 200


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = ["What is a badger?", "  two  spaces", "It's 1,234 past\n\n7", "naïve 中文 😀", "<s> [INST] x [/INST]", ""]


def test_a_sentencepiece_vocabulary_gives_the_ids_it_gave(tmp_path: Path):
    folder = tiny.ASSETS / "base"
    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    made = write_tokenizer(metadata, tmp_path / "made")
    assert [path.name for path in made] == ["tokenizer.model", "tokenizer_config.json"]
    theirs, ours = load_tokenizer(folder), load_tokenizer(tmp_path / "made")
    assert (ours.bos, ours.eos, ours.vocab_size) == (theirs.bos, theirs.eos, theirs.vocab_size)
    for text in [*TEXTS, *(tiny.ASSETS / "text" / "wordnet.txt").read_text().splitlines()[:30]]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode_continued(text) == theirs.encode_continued(text)
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))
    assert sentencepiece.SentencePieceProcessor(model_file=str(made[0])).bos_id() == 1


def byte_level(**changes: Any) -> dict[str, Any]:
    """256 bytes, a few merges, and control tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = ["Ġ t", "h e", "Ġt he", "Ġ Ġ", "Ġ 1", "1 2"]
    tokens = ["<|end|>", "<|user|>", *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    } | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def pieces(folder: Path, text: str) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids).removeprefix("<|user|>") == text.removeprefix("<|user|>")
    return tokenizer.convert_ids_to_tokens(ids)


def test_a_byte_level_vocabulary_becomes_a_tokenizer_that_transformers_opens(tmp_path: Path):
    made = write_tokenizer(byte_level(), tmp_path)
    assert [path.name for path in made] == ["tokenizer.json", "tokenizer_config.json"]
    # Beside a Mixtral's config.json transformers must still take this tokenizer, not Llama's.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    assert pieces(tmp_path, "<|user|>a the") == ["<|user|>", "a", "Ġthe"]
    assert pieces(tmp_path, "ä") == ["Ã", "¤"]
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == 0


def test_its_ids_and_template_are_those_that_runs_use(tmp_path: Path):
    template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    metadata = byte_level(add_bos_token=False) | {"tokenizer.chat_template": template}
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens = [*tokens[:2], "<a>", "<b>", "<c>", *tokens[2:]]
    changes: dict[str, Any] = {"tokens": tokens, "token_type": [3, 3, 3, 3, 5, *types[2:]]}
    write_tokenizer(metadata | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}, tmp_path)
    ours = load_tokenizer(tmp_path, rows=400)
    assert [ours.pieces.id_to_piece(id) for id in range(len(tokens))] == tokens
    assert (ours.bos, ours.eos, ours.ends, ours.vocab_size) == (None, 0, (0,), len(tokens))
    assert ours.prompt == "own" and ours.templates["own"].source == template
    assert ours.tags == ImageTags(start=len(tokens), end=len(tokens) + 1, pad=len(tokens) + 2)
    for text in TEXTS:
        assert ours.decode(ours.encode(text)) == text


def test_text_is_cut_as_the_file_says(tmp_path: Path):
    wanted = {"smollm": ["ĠĠ", "1", "2"], "gpt-2": ["Ġ", "Ġ1", "2"], "llama-bpe": ["Ġ", "Ġ", "12"]}
    for pre, cut in wanted.items():
        write_tokenizer(byte_level(pre=pre), tmp_path / pre)
        assert pieces(tmp_path / pre, "  12") == cut, pre
    write_tokenizer(byte_level(add_bos_token=True), tmp_path / "bos")
    assert pieces(tmp_path / "bos", "a") == ["<|user|>", "a"]
    for pre, begins in (("llama-bpe", True), ("smollm", False)):  # where the file does not say
        silent = {name: value for name, value in byte_level(pre=pre).items() if "add_bos" not in name}
        write_tokenizer(silent, tmp_path / f"silent {pre}")
        assert pieces(tmp_path / f"silent {pre}", "a") == ["<|user|>"] * begins + ["a"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert"}, "is 'bert'; only gpt2"),
        ({"pre": "deepseek-llm"}, "cuts text as 'deepseek-llm'; only gpt-2, smollm"),
        ({"token_type": [1]}, "264 different tokens and 1 types"),
        ({"merges": ["q zz"]}, "merges that do not fit"),
        ({"merges": ["q"]}, "merges that do not fit"),
        ({"eos_token_id": 999}, "264 tokens, but .*999"),
        ({"model": "llama"}, "264 tokens and 0 scores"),
        (
            {"tokens": ["<|end|>", "a:b", *byte_level()["tokenizer.ggml.tokens"][2:]], "add_bos_token": True},
            "begins texts with 'a:b', which",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_written_is_refused(tmp_path: Path, changes: dict[str, Any], said: str):
    with pytest.raises(MoextendError, match=said):
        write_tokenizer(byte_level(**changes), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
