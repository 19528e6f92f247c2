"""`--layout hf` of every family, tower and start: stock PyTorch makes of the folder what JAX makes of the model.

Tiny models with random weights, no tokenizer: ids, pixels and spectrograms go in on both sides.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax.checkpoints import huggingface, names
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.checkpoints.source import Source
from moextend_jax.checkpoints.store import Record
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    DecoderConfig,
    ExtensionConfig,
    ImageTags,
    LinearRopeConfig,
    Llama3RopeConfig,
    Medium,
    ModelConfig,
    Named,
    ProjectorConfig,
    VisionConfig,
    WhisperConfig,
    YarnConfig,
    of_pictures,
)
from moextend_jax.families import FAMILIES
from moextend_jax.families.towers import TOWERS
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays

SCRIPT = Path(__file__).with_name("stock_families.py")
PAD = 60
SPEECH = Medium(
    kind="audio", mark="<audio:speech>", tags=ImageTags(start=58, end=59, pad=57), spans=(3, 7),
    tower=WhisperConfig(width=16, hidden=24, layers=2, heads=2, bands=8, seconds=1),
    projector=ProjectorConfig(kind="pool", neighbours=8),
)  # fmt: skip
SIZES: dict[str, Any] = {
    "vocab_size": 61, "width": 24, "hidden": 16, "layers": 3, "heads": 4, "kv_heads": 2, "head_size": 8, "experts": 8,
    "top_k": 3,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "mixtral": {"rope_scaling": Llama3RopeConfig(factor=8.0, length=16, low=1.0, high=4.0)},
    "granitemoe": {
        "embed_factor": 3.0, "residual_factor": 0.5, "logits_divisor": 2.0, "attention_scale": 0.3, "tied_head": True,
    },
    "olmoe": {"head_size": 6,  # its class knows no other than width over heads
              "rope_scaling": LinearRopeConfig(factor=2.0)},
    "qwen2_moe": {"shared_hidden": 20},
    "qwen3_moe": {"normalised": True, "rope_scaling": YarnConfig(factor=4.0, length=8)},
    "glm4_moe": {"dense_hidden": 20, "shared_experts": 2, "groups": 4, "top_groups": 2, "routed_factor": 2.5,
                 "qkv_bias": True, "qk_norm": "head",
                 "rope_scaling": YarnConfig(factor=4.0, length=8, whole=False)},
    "gpt_oss": {"local": (True, False, True), "local_window": 4,
                "rope_scaling": YarnConfig(factor=4.0, length=8, growth=1.5)},
    "ernie4_5_moe": {"dense_hidden": 20, "shared_experts": 1, "rope_scaling": YarnConfig(factor=4.0, length=8)},
}  # fmt: skip
LAYERS = (1, 2)
STARTS: dict[str, dict[str, Any]] = {
    "copy": {},
    "two": {"new_experts": 2, "sources": (1, 3, 0, 6), "wide": 1},
    "wide": {"new_experts": 1, "sources": (1, 3, 0, 6), "wide": 2},
    "lowered": {"start": "lowered"},
    "twin": {"start": "twin", "new_experts": 2, "sources": (1, 3, 6, 6)},
    "added": {"start": "added", "new_experts": 2, "sources": (1, 3, 0, 6)},
}
CHAINS: dict[str, dict[str, dict[str, Any]]] = {
    "tasks": {
        "sums": {"medium": "", "layers": (1,), "sources": (1,)},
        "dates": {
            "medium": "",
            "new_experts": 2,
            "wide": 2,
            "sources": (1, 3, 0, 6, 2, 5, 7, 4),
            "calibrator_width": 3,
        },
    },
    "seen": {"image": {}, "sums": {"medium": "", "layers": (2,), "new_experts": 2, "sources": (0, 6)}},
    "starts": {
        "pets": {"start": "twin", "new_experts": 2, "sources": (1, 3, 6, 6)},
        "sums": {"medium": "", "start": "added", "new_experts": 2, "layers": (2,), "sources": (0, 6), "share": 0.5},
        "cars": {"start": "twin", "layers": (2,), "sources": (6,)},
        "days": {"medium": "", "start": "lowered"},
    },
    "pictures": {
        "pets": {"share": 0.5},
        "cars": {"share": 0.25, "layers": (2,), "new_experts": 2, "sources": (0, 6)},
        "dogs": {"share": 0.0},
    },
    "heard": {"image": {}, "talk": {"medium": "speech", "start": "twin", "layers": (2,), "sources": (6,)}},
}
"""Several extensions of one model, of other layers, sizes, media and starts."""
CASES: dict[str, tuple[str, str, str, str]] = {
    # family, tower, start, recipe's mass
    **{family: (family, "clip", "", "base") for family in FAMILIES},
    **{f"{family}-{start}": (family, "clip", start, "base") for family in FAMILIES for start in ("copy", "twin")},
    **{f"{family}-{start}": (family, "clip", start, "base")
       for family in ("mixtral", "glm4_moe", "gpt_oss") for start in ("two", "wide", "lowered", "added")},
    **{f"{family}-literal": (family, "clip", "two", "literal") for family in ("olmoe", "glm4_moe", "ernie4_5_moe")},
    **{f"olmoe-{tower}": ("olmoe", tower, "two", "base") for tower in ("siglip", "dinov2")},
    "olmoe-giant": ("olmoe", "dinov2", "two", "base"),  # a tower whose layers have a SwiGLU
    **{f"{family}-text": (family, "", "", "base") for family in FAMILIES},
    **{f"{family}-task": (family, "", "two", "base") for family in FAMILIES},  # in text
    **{f"{family}-tasks": (family, "", "tasks", "base") for family in ("mixtral", "glm4_moe", "gpt_oss")},
    **{f"{family}-{chain}": (family, "clip", chain, "base")
       for family in ("mixtral", "glm4_moe", "gpt_oss") for chain in ("seen", "starts")},
    **{f"{family}-{chain}-strict": (family, "clip", chain, "base")
       for family in ("mixtral", "glm4_moe", "olmoe") for chain in ("seen", "starts")},
    **{f"{family}-{chain}-decoupled{text}": (family, "clip", chain, "base")
       for family in ("mixtral", "glm4_moe", "olmoe") for chain in ("pictures", "seen", "starts")
       for text in ("", "-strict")},
    "mixtral-tasks-decoupled": ("mixtral", "", "tasks", "base"),
    **{f"{family}-heard-strict": (family, "clip", "heard", "base") for family in ("granitemoe", "glm4_moe", "gpt_oss")},
    "olmoe-starts": ("olmoe", "clip", "starts", "literal"),
}  # fmt: skip


def config_of(case: str) -> ModelConfig:
    family, tower, start, mass = CASES[case]
    fields = {**FAMILIES[family].fields, **MORE.get(family, {})}
    decoder = DecoderConfig(family=family, **{**SIZES, **fields})
    added = {"layers": LAYERS, "sources": (1, 3), "calibrator_width": 5}
    one = {"image" if tower else "sums": {"medium": "image" if tower else "", **STARTS.get(start, {})}} if start else {}
    extensions = {name: ExtensionConfig(**added | own) for name, own in CHAINS.get(start, one).items()}
    more: dict[str, Any] = {"extensions": Named(extensions), "dtype": "float32", "remat": "none", "mass": mass}
    more |= {"text_isolation": isolation_of(case), "composition": "decoupled" if "-decoupled" in case else "shared"}
    if not tower:
        return dataclasses.replace(of_pictures(decoder=decoder), **more)
    vision = dataclasses.replace(
        VisionConfig(family=tower, **TOWERS[tower].fields),
        **{"width": 16, "hidden": 32, "layers": 2, "heads": 2, "image_size": 8, "patch_size": 4, "norm_eps": 1e-6},
        activation="gelu_pytorch_tanh" if tower == "siglip" else "gelu",
        gated=case.endswith("-giant"),
    )
    seeing = of_pictures(decoder=decoder, vision=vision, tags=ImageTags(start=58, end=59, pad=PAD))
    media = {**seeing.media, "speech": SPEECH} if start == "heard" else seeing.media
    return dataclasses.replace(seeing, media=Named(media), **more)


def isolation_of(case: str) -> Any:
    return "strict" if case.endswith("-strict") else "none"


def arrays_of(config: ModelConfig) -> dict[str, jax.Array]:
    return tiny.arrays(config, std=0.2)


def export(case: str, folder: Path) -> None:
    config = config_of(case)
    leaves = huggingface.from_arrays(arrays_of(config), config=config)
    source = Source(leaves, Record(config, config.decoder.family, {}, ("llava", ""), None, {}), {})
    recipe = dataclasses.replace(RECIPES["paper"], mass=CASES[case][3])
    export_transformers(source, folder, recipe=recipe, text_isolation=isolation_of(case), max_shard_bytes=1 << 30)


def batch(*, heard: bool = False) -> Batch:
    """Two rows have the picture, in other places, and the last has none; `heard`: the last two have a sound."""
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(7, 50, (3, 12)).astype(np.int32)
    places_BL = np.full_like(ids_BL, -1)
    for row, at in enumerate((1, 4)):
        places_BL[row, at : at + 4] = np.arange(4)
    ids_BL[places_BL >= 0] = PAD
    for row, here in ((1, slice(9, 12)), (2, slice(2, 9))) if heard else ():
        ids_BL[row, here], places_BL[row, here] = SPEECH.tags.pad, 4 + np.arange(here.stop - here.start)
    positions_BL = np.broadcast_to(np.arange(12, dtype=np.int32), ids_BL.shape)
    pixels = rng.normal(size=(3, 1, 8, 8, 3)).astype(np.float32)
    arrays = ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, np.ones_like(ids_BL), places_BL
    sounds = {"speech": rng.normal(size=(3, 1, 8, 100)).astype(np.float32)} if heard else {}
    return Batch(*arrays, media={"image": pixels, **sounds})


@pytest.fixture(scope="module")
def stock(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Path]:
    """What transformers says of the cases that are tested now, in a process that does not know where this package is;
    and their folders."""
    pytest.importorskip("torch", reason="torch is not installed: pip install moextend-jax[torch]")
    pytest.importorskip("transformers", minversion="5.0")
    root = tmp_path_factory.mktemp("hf")
    specs = [getattr(item, "callspec", None) for item in request.session.items]
    tested = {spec.params.get("case") for spec in specs if spec is not None}
    cases = [case for case in CASES if case in tested]
    for case in cases:
        export(case, root / case)
    given, inputs, out = batch(), root / "inputs.npz", root / "outputs.npz"
    pixels = np.asarray(given.media["image"])[:2, 0].transpose(0, 3, 1, 2)
    heard = batch(heard=True)
    sounds = {"heard_BL": heard.ids_BL.astype(np.int64), "input_features": np.asarray(heard.media["speech"])[1:, 0]}
    np.savez(inputs, ids_BL=given.ids_BL.astype(np.int64), pixel_values=pixels, **sounds)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    words = [sys.executable, str(SCRIPT), str(inputs), str(out), *(str(root / case) for case in cases)]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=root)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return read_npz(out), root


def check(case: str, theirs: Mapping[str, Any], folder: Path) -> None:
    config, answer_BN = config_of(case), theirs[f"{case}/answer"]
    given = batch(heard="speech" in config.media)
    length = given.ids_BL.shape[1]
    # With the answer behind: each token of it is the likeliest after those before.
    longer = {name: np.pad(getattr(given, name), ((0, 0), (0, answer_BN.shape[1])), constant_values=filled)
              for name, filled in (("labels_BL", IGNORE), ("segments_BL", 1), ("places_BL", -1))}  # fmt: skip
    longer["ids_BL"] = np.concatenate([given.ids_BL, answer_BN], axis=1).astype(np.int32)
    longer["positions_BL"] = np.broadcast_to(
        np.arange(longer["ids_BL"].shape[1], dtype=np.int32), longer["ids_BL"].shape
    )
    if not config.media:
        longer |= {"media": {}, "places_BL": np.full_like(longer["places_BL"], -1)}
    arrays = arrays_of(config)
    model = with_arrays(abstract(config), arrays)
    longer_BLV = np.asarray(model.decoder.logits(model(jax.tree.map(jnp.asarray, given._replace(**longer))).hidden_BLD))
    np.testing.assert_array_equal(longer_BLV[:, length - 1 : -1].argmax(axis=-1), answer_BN)
    logits_BLV = longer_BLV[:, :length]
    assert np.abs(logits_BLV).max() > 0.5
    np.testing.assert_allclose(theirs[f"{case}/logits"], logits_BLV, atol=1e-4, rtol=0)
    # Rounded as bfloat16 rounds; float32 parts stay so.
    assert np.median(np.abs(theirs[f"{case}/half"] - logits_BLV)) < 0.03 * np.abs(logits_BLV).max()
    tensors = folders.read(folder)
    assert sorted(tensors) == list(theirs[f"{case}/names"])
    opened = open_checkpoint(folder)
    assert opened.source.record.layout == ("hf" if config.media or config.extensions else config.decoder.family)
    assert (opened.config.extensions, opened.config.composition) == (config.extensions, config.composition)
    assert opened.config.media.get("speech") == config.media.get("speech")
    assert opened.config.decoder == config.decoder
    folders.assert_same(opened.arrays, {path: np.asarray(leaf) for path, leaf in arrays.items()})


BY_HAND = {
    case for case in CASES
    if case.endswith(("-text", "-task", "-twin")) and not case.startswith(("mixtral-", "glm4_moe-", "gpt_oss-"))
} | {
    "gpt_oss-wide", "glm4_moe-added", "mixtral-lowered", "glm4_moe-two", "ernie4_5_moe-literal", "gpt_oss-tasks",
    "glm4_moe-tasks", "mixtral-starts", "glm4_moe-seen", "gpt_oss-seen", "olmoe-seen-strict", "mixtral-starts-strict",
    "mixtral-seen-decoupled", "mixtral-seen-decoupled-strict", "mixtral-starts-decoupled-strict",
    "glm4_moe-starts-decoupled", "olmoe-starts-decoupled-strict", "mixtral-tasks-decoupled",
    "glm4_moe-heard-strict", "gpt_oss-heard-strict",
}  # fmt: skip
"""What the same families with a picture, and the same start of two other families, show too."""


FAST = {"mixtral-seen-strict", "mixtral-pictures-decoupled-strict", "mixtral-starts-decoupled"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case in FAST else pytest.mark.long if case in BY_HAND else pytest.mark.slow)
        for case in CASES
    ],
)
def test_stock_transformers_computes_every_family_and_start(case: str, stock):
    check(case, stock[0], stock[1] / case)


@pytest.mark.slow
def test_names_of_an_extension_are_unique_in_every_family():
    for family in FAMILIES:
        config = config_of(f"{family}-copy")
        files = [tensor.file for tensor in names.tensors("transformers", config)]
        assert len(files) == len({*files})
        assert {*arrays_of(config)} == {tensor.path for tensor in names.tensors("transformers", config)}
