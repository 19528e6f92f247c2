"""Scaled rotary positions: the frequencies of transformers' own functions, what config.json may say, whole models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_llama as llama

from moextend_jax import cli
from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.llama import llama_config
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.config import DecoderConfig, LinearRopeConfig, Llama3RopeConfig, MoextendError, YarnConfig
from moextend_jax.families import FAMILIES
from moextend_jax.families.rope import ROPE_TYPES, read_rope, rope_attributes
from moextend_jax.models.rope import ROPE_SCALINGS, frequencies

WHERE = Path("config.json")
LENGTH = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 8192}
"""Llama 3.1's."""
YARN = {"rope_type": "yarn", "factor": 4.0, LENGTH: 32768}
"""As the model cards of Qwen3 write it."""
OF_A_SHORT_MODEL = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 16}
SCALINGS: dict[str, dict[str, Any]] = {
    "Llama 3.1": LLAMA3,
    "Llama 3.2": LLAMA3 | {"factor": 32.0},
    "llama3, short": OF_A_SHORT_MODEL | {"low_freq_factor": 1, "high_freq_factor": 2.5},
    "Qwen3": YARN,
    "gpt-oss": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                LENGTH: 4096},
    "yarn, betas": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": None},
    "yarn, attention_factor": YARN | {"attention_factor": 0.75},
    "yarn, mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn, one mscale": YARN | {"mscale": 0.7},
    "yarn, no factor": YARN | {"factor": None},
    "yarn, no growth": YARN | {"factor": 0.5},
    "yarn, a ramp of no length": YARN | {LENGTH: 3},
    "yarn, very long": YARN | {LENGTH: 1 << 30},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "linear, old spelling": {"type": "linear", "factor": 4},
}  # fmt: skip
SIZES = [(128, 5e5), (64, 1.5e5), (8, 1e4), (6, 100.0)]
MOST = 131072


def frequencies_of(rope: dict[str, Any], size: int, theta: float) -> tuple[np.ndarray, float]:
    attributes = {"rope_scaling": rope, "rope_theta": theta, "max_position_embeddings": MOST}
    scaling = read_rope("rope_scaling", attributes, where=WHERE)["rope_scaling"]
    frequency_h, growth = frequencies(DecoderConfig(head_size=size, rope_theta=theta, rope_scaling=scaling))
    return np.asarray(frequency_h), growth


@pytest.mark.parametrize("name", SCALINGS)
def test_the_frequencies_are_those_of_transformers(name: str):
    pytest.importorskip("torch", reason="transformers' functions need torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for size, theta in SIZES:
        attributes: dict[str, Any] = {
            "hidden_size": 4 * size, "num_attention_heads": 4, "head_dim": size, "max_position_embeddings": MOST,
            "rope_theta": theta, "rope_scaling": dict(SCALINGS[name]),  # which the class completes
        }  # fmt: skip
        config: Any = LlamaConfig(**attributes)
        theirs_h, theirs = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
        ours_h, ours = frequencies_of(SCALINGS[name], size, theta)
        np.testing.assert_allclose(ours_h, theirs_h.numpy(), rtol=2e-6, err_msg=f"{size}, {theta}")
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_frequencies_are_those_of_the_formulas():
    plain_h = 5e5 ** -(np.arange(0, 128, 2) / 128)
    ours_h, growth = frequencies_of(LLAMA3, 128, 5e5)
    assert growth == 1
    for ours, plain in zip(ours_h, plain_h, strict=True):
        wave = 2 * np.pi / plain
        smooth = (8192 / wave - 1) / (4 - 1)
        between = (1 - smooth) * plain / 8 + smooth * plain
        expected = plain if wave < 8192 / 4 else plain / 8 if wave > 8192 / 1 else between
        assert ours == pytest.approx(expected, rel=2e-6)
    assert np.sum((ours_h < plain_h * 0.99) & (ours_h > plain_h / 7.9)) > 3  # some are between

    plain_h = 1e6 ** -(np.arange(0, 128, 2) / 128)
    ours_h, growth = frequencies_of(YARN, 128, 1e6)
    assert growth == pytest.approx(0.1 * np.log(4) + 1)
    low, high = (128 * np.log(32768 / (times * 2 * np.pi)) / (2 * np.log(1e6)) for times in (32, 1))
    ramp_h = np.clip((np.arange(64) - np.floor(low)) / (np.ceil(high) - np.floor(low)), 0, 1)
    np.testing.assert_allclose(ours_h, plain_h / 4 * ramp_h + plain_h * (1 - ramp_h), rtol=2e-6)
    assert frequencies_of(YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, 64, 1e6)[1] == pytest.approx(
        (0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)
    )

    ours_h, growth = frequencies_of({"type": "linear", "factor": 4.0}, 128, 1e6)
    np.testing.assert_allclose(ours_h, plain_h / 4, rtol=1e-6)
    assert growth == 1


def test_every_row_that_can_be_read_can_be_computed_and_written():
    assert ROPE_TYPES.keys() == ROPE_SCALINGS.keys()
    for rope in SCALINGS.values():
        attributes = {"rope_scaling": rope, "max_position_embeddings": MOST}
        scaling = read_rope("rope_scaling", attributes, where=WHERE)["rope_scaling"]
        written = rope_attributes(scaling)
        said = {name: value for name, value in rope.items() if value is not None and name != "type"}
        assert said.items() <= written.items()
        assert read_rope("rope_scaling", {"rope_scaling": written}, where=WHERE)["rope_scaling"] == scaling


# --- config.json ------------------------------------------------------------------------------------------------------


def read(family: str, changes: dict[str, Any]) -> DecoderConfig:
    """Of every family, and of a dense Llama, which becomes a Mixtral."""
    if family == "llama":
        return llama_config(llama.attributes(**changes), where=WHERE)
    sizes = {"layers": 2, "local": (True, False) if family == "gpt_oss" else (), "local_window": 4, "dense_hidden": 8}
    decoder = DecoderConfig(family=family, **{**FAMILIES[family].fields, **sizes})
    written = huggingface.decoder_attributes(decoder, dtype="float32") | {"max_position_embeddings": 64} | changes
    written = {name: value for name, value in written.items() if value is not ...}
    return huggingface.decoder_config(json.loads(json.dumps(written)), where=WHERE)


@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_every_family_has_both_spellings_and_writes_them(family: str):
    inner = {name: value for name, value in OF_A_SHORT_MODEL.items() if name != LENGTH}
    scaling = Llama3RopeConfig(factor=8.0, length=16, low=1.0, high=4.0)
    old = read(family, {"rope_scaling": OF_A_SHORT_MODEL, "rope_theta": 5e5})
    assert (old.rope_scaling, old.rope_theta) == (scaling, 5e5)
    new = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": OF_A_SHORT_MODEL | {"rope_theta": 5e5}}
    assert read(family, new) == old
    assert read(family, new | {"rope_theta": 5e5, "rope_scaling": OF_A_SHORT_MODEL}) == old  # both say the same
    outside = {"rope_scaling": inner, "rope_theta": 5e5, LENGTH: 16}
    assert read(family, outside) == old  # as Phi-3 writes it: transformers takes the outer one first
    assert read(family, outside | {"rope_scaling": OF_A_SHORT_MODEL | {LENGTH: 7}}) == old
    of_most = dataclasses.replace(scaling, length=64)  # where nothing is said, max_position_embeddings
    assert read(family, {"rope_scaling": inner, "rope_theta": 5e5}).rope_scaling == of_most
    assert read(family, {"rope_scaling": {"type": "linear", "factor": 2}}).rope_scaling == LinearRopeConfig(factor=2.0)
    ratio = read(family, {"rope_scaling": {"type": "yarn", "factor": None, LENGTH: 16}}).rope_scaling
    assert ratio == YarnConfig(factor=4.0, length=16)
    written = huggingface.decoder_attributes(old, dtype="float32")
    assert written["rope_scaling"] == OF_A_SHORT_MODEL
    assert huggingface.decoder_config(written, where=WHERE) == old
    plain = huggingface.decoder_attributes(dataclasses.replace(old, rope_scaling=None), dtype="float32")
    assert plain.get("rope_scaling") == ({"rope_type": "default"} if family == "gpt_oss" else None)


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic.* cannot be honoured .only a rope_type of default, yarn, l"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "longrope.* cannot be honoured"),
        ({"rope_type": "proportional"}, "proportional.* cannot be honoured"),
        ({"rope_type": ["yarn"]}, "yarn.* cannot be honoured .only a rope_type"),
        ({"rope_type": "default", "factor": 2.0}, "default.* cannot be honoured"),
        ([1], r"\[1\] cannot be honoured"),
        ({"type": "linear"}, "cannot be honoured .linear has positive numbers factor"),
        ({"type": "linear", "factor": "2"}, "cannot be honoured .linear has"),
        ({"type": "linear", "factor": -2}, "cannot be honoured .linear has"),
        ({"type": "linear", "factor": float("nan")}, "cannot be honoured .linear has"),
        ({"type": "linear", "factor": True}, "cannot be honoured .linear has"),
        ({"type": "linear", "factor": 2.0, "surprise": 1}, "surprise.* cannot be honoured .linear has"),
        ({"rope_type": "llama3", "factor": 8.0}, "cannot be honoured .llama3 has .*, low_freq_factor, high_freq_fac"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "cannot be honoured .llama3 has"),
        (LLAMA3 | {LENGTH: 8192.5}, "cannot be honoured .llama3 has"),
        (LLAMA3 | {LENGTH: None}, "cannot be honoured .llama3 has"),
        ({"rope_type": "yarn"}, "cannot be honoured .yarn has positive numbers factor"),
        (YARN | {"truncate": None}, "cannot be honoured .yarn has"),
        (YARN | {"rope_theta": 1}, "cannot be honoured .yarn has"),
        (YARN | {"attention_factor": 0}, "cannot be honoured .yarn has"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused_by_name(rope: Any, said: str):
    for family in ("qwen3_moe", "llama"):
        for name in ("rope_scaling", "rope_parameters"):
            with pytest.raises(MoextendError, match=f"config.json: {name} = .*{said}"):
                read(family, {name: rope})


def test_two_spellings_that_differ_are_refused():
    """As where a model card's rope_scaling is added to a file of transformers 5, which then forgets its rope_theta."""
    plain = {"rope_type": "default", "rope_theta": 1e6}
    for family in ("qwen3_moe", "llama"):
        with pytest.raises(MoextendError, match="rope_scaling and rope_parameters differ"):
            read(family, {"rope_theta": ..., "rope_parameters": plain, "rope_scaling": YARN})


# --- whole models -----------------------------------------------------------------------------------------------------

IDS_BL = np.random.default_rng(1).integers(0, llama.DENSE.vocab_size, (2, 40))


def dense_folder(folder: Path, **changes: Any) -> Path:
    return llama.write_folder(folder, max_position_embeddings=64, rope_scaling=OF_A_SHORT_MODEL, **changes)


def test_an_upcycled_llama_3_keeps_its_scaling_from_import_to_export(tmp_path: Path):
    cli.call(["import", str(dense_folder(tmp_path / "dense")), str(tmp_path / "imported"), "--experts=4"])
    opened = open_checkpoint(tmp_path / "imported")
    decoder = opened.config.decoder
    assert decoder.rope_scaling == Llama3RopeConfig(factor=8.0, length=16, low=1.0, high=4.0)
    ours = llama.logits(opened.arrays, decoder, IDS_BL)
    plain = llama.logits(opened.arrays, dataclasses.replace(decoder, rope_scaling=None), IDS_BL)
    assert np.abs(ours - plain).max() > 0.01
    cli.call(["export", str(tmp_path / "imported"), str(tmp_path / "out")])
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (exported["rope_scaling"], exported["max_position_embeddings"]) == (OF_A_SHORT_MODEL, 64)
    torch = pytest.importorskip("torch", reason="the reference needs the torch extra")
    from transformers import AutoModelForCausalLM

    for folder in ("dense", "out"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert model.config.rope_parameters["rope_type"] == "llama3"
        with torch.no_grad():
            theirs = model(torch.from_numpy(IDS_BL)).logits.numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_records_of_when_yarn_was_the_only_scaling_are_read(tmp_path: Path):
    cli.call(["import", str(dense_folder(tmp_path / "dense")), str(tmp_path / "imported"), "--experts=2"])
    file = tmp_path / "imported" / "moextend.json"
    record = json.loads(file.read_text())
    fields = record["model"]["decoder"]
    assert fields.pop("rope_scaling")["kind"] == "llama3"
    before = {"factor": 32.0, "length": 4096, "fast": 32.0, "slow": 1.0, "whole": False}
    for yarn, now in ((None, None), (before, YarnConfig(factor=32.0, length=4096, whole=False))):
        fields["yarn"] = yarn
        file.write_text(json.dumps(record))
        assert open_checkpoint(tmp_path / "imported").config.decoder.rope_scaling == now
    fields["yarn"] = before | {"factor": -1.0}
    file.write_text(json.dumps(record))
    with pytest.raises(MoextendError, match="rope_scaling = .* is impossible"):
        open_checkpoint(tmp_path / "imported")
