"""The table of families: what the docs say of it, and what an attribute that a family cannot honour gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moextend_jax.checkpoints import huggingface
from moextend_jax.config import DecoderConfig, MoextendError
from moextend_jax.families import FAMILIES
from moextend_jax.plan.sizes import DECODERS

DOCS = Path(__file__).parents[1] / "docs" / "families.md"


def rows() -> list[str]:
    """The docs' table."""
    lines = []
    for name, family in FAMILIES.items():
        fields = ", ".join(f"`{field} = {value}`" for field, value in family.fields.items()) or "none"
        lines.append(f"| `{name}` | {family.architecture} | {fields} | {', '.join(family.published)} |")
    return lines


def test_the_docs_have_the_table():
    written = [line for line in DOCS.read_text().splitlines() if line.startswith("| `")]
    assert written[1:] == rows()  # the first is the header


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
        ({"shared_expert_intermediate_size": 5}, "shared_expert_intermediate_size is unknown"),
        ({"model_type": "qwen3_next"}, "model_type is 'qwen3_next', expected one of"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict, message: str, tmp_path: Path):
    huggingface.write_decoder_config(tmp_path, DECODERS["Qwen3-30B-A3B"], dtype="bfloat16")
    attributes = huggingface.read_json(tmp_path / "config.json")
    with pytest.raises(MoextendError, match=message):
        read(tmp_path, attributes | change)


def read(folder: Path, attributes: dict) -> DecoderConfig:
    (folder / "config.json").write_text(json.dumps(attributes))
    return huggingface.read_decoder_config(folder)
