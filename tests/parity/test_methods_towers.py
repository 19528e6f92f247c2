"""Towers and projectors of other media against reference numbers of published methods.

    MOEXTEND_METHODS=FOLDER pytest tests/parity/test_methods_towers.py       (several: with os.pathsep between them)

In: folders in the layout of ../shared/methods_oracle (its scripts describe the arrays), else that one. Sizes are read
from the arrays. What a folder lacks is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.checkpoints.leaves import read_slice
from moextend_jax.checkpoints.tensors import Planned, write_safetensors
from moextend_jax.checkpoints.whisper import read_whisper
from moextend_jax.config import ProjectorConfig, WhisperConfig
from moextend_jax.media.mel import log_mel, slaney_filters
from moextend_jax.models.projectors import Resampler, join_frames, make_projector
from moextend_jax.models.whisper import WhisperTower
from moextend_jax.models.woven import fused
from moextend_jax.parameters import with_arrays
from parity import sets
from parity.methods import FOLDERS, there
from parity.sets import COMPOSED, SIMPLE


@pytest.fixture(scope="module", params=FOLDERS, ids=str)
def folder(request: pytest.FixtureRequest) -> Path:
    """One folder of reference numbers of methods."""
    return there(request.param)


def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """All of NAME.npz, float32."""
    return {key: np.asarray(array, np.float32) for key, array in sets.arrays(folder, name).items()}


def test_whisper_states(folder: Path, tmp_path: Path):
    given = arrays(folder, "whisper")
    file = {key.removeprefix("file/"): array for key, array in given.items() if key.startswith("file/")}
    S, C = file["embed_positions.weight"].shape
    depth = sum(key.startswith("hidden/") for key in given) - 1
    J, seconds = len(file["layers.0.fc1.weight"]), -(-S // 50)
    config = WhisperConfig(
        width=C, hidden=J, layers=depth, heads=int(given["heads"]), bands=given["mel_nbl"].shape[1], seconds=seconds
    )
    # A file has whole seconds of positions: these are filled up, and taken off again.
    file["embed_positions.weight"] = np.pad(file["embed_positions.weight"], ((0, 50 * seconds - S), (0, 0)))
    planned = {f"model.encoder.{n}": Planned(a.shape, a.dtype, lambda a=a: [a]) for n, a in file.items()}
    write_safetensors(tmp_path, planned, max_shard_bytes=1 << 30)
    (tmp_path / "config.json").write_text(json.dumps(folders.whisper_attributes(config)))
    opened = read_whisper(tmp_path)
    assert opened.config == config
    leaves = {path: read_slice(leaf, (slice(None),) * len(leaf.shape)) for path, leaf in opened.leaves.items()}
    leaves["position"] = leaves["position"][:S]
    tower = nnx.eval_shape(lambda: WhisperTower(config, rngs=nnx.Rngs(0), dtype="float32"))

    @jax.jit
    def run(leaves: dict[str, jax.Array], mel_nbl: jax.Array) -> list[jax.Array]:
        model = with_arrays(tower, leaves)
        return [model.hidden_state(mel_nbl, layer=layer) for layer in range(depth + 1)]

    states = run(leaves, given["mel_nbl"])
    for layer, state in enumerate(states):
        np.testing.assert_allclose(state, given[f"hidden/{layer}"], atol=SIMPLE, rtol=0, err_msg=str(layer))
    np.testing.assert_allclose(states[-1], given["last_nSC"], atol=SIMPLE, rtol=0)


def test_whisper_front_end(folder: Path):
    given = arrays(folder, "whisper")
    bands, frames = given["wave_mel_bl"].shape
    np.testing.assert_allclose(slaney_filters(bands).toarray(), given["filters_fb"], atol=1e-7)
    mel_bl = log_mel(given["wave_a"], bands=bands, seconds=frames / 100)
    # The reference's Fourier transform is in float32, which ours is not: of a frame's bands, those that are far below
    # its loudest have rounding errors of that one.
    np.testing.assert_allclose(mel_bl, given["wave_mel_bl"], atol=COMPOSED, rtol=0)
    loud_bl = mel_bl > mel_bl.max(axis=0) - 4 / 4
    np.testing.assert_allclose(mel_bl[loud_bl], given["wave_mel_bl"][loud_bl], atol=SIMPLE, rtol=0)


def resampler(given: dict[str, np.ndarray]) -> tuple[Resampler, Any]:
    """The structure, and what makes its leaves for a modality m of the arrays of crema.npz, updates merged in.

    Those do not say how many heads there are: it is the number that gives the first modality's tokens.
    """
    features_BtSc, tokens_BtqD = given["features_mBtSc"][0], given["tokens_mBtqD"][0]
    features_nSc = features_BtSc.reshape(-1, *features_BtSc.shape[2:])
    for heads in (n for n in range(1, len(given["up_CJ"]) + 1) if len(given["up_CJ"]) % n == 0):
        module, leaves = of_heads(given, heads)
        tokens_nqD = with_arrays(module, leaves(given, 0))(features_nSc)
        if np.allclose(tokens_nqD, tokens_BtqD.reshape(tokens_nqD.shape), atol=COMPOSED):
            return module, leaves
    pytest.fail("crema.npz: no number of heads gives its tokens")


def of_heads(given: dict[str, np.ndarray], heads: int) -> tuple[Resampler, Any]:
    c, q, C, J = len(given["cross_key_cC"]), given["queries_mqC"].shape[1], *given["up_CJ"].shape
    D, N = given["project_mCD"].shape[2], heads
    config = ProjectorConfig(kind="resampler", queries=q, layers=1, heads=N)
    module = nnx.eval_shape(lambda: make_projector(config, C=C, P=9, D=D, rngs=nnx.Rngs(0), dtype="float32"))
    assert isinstance(module, Resampler) and c and J

    def attention(leaves: dict[str, Any], prefix: str) -> dict[str, Any]:
        heads = {part: leaves[part].reshape(1, -1, N, C // N) for part in ("query", "key", "value")}
        biases = {f"{part}_bias": leaves[f"{part}_bias"].reshape(1, N, C // N) for part in ("query", "key", "value")}
        out = {"out": leaves["out"].reshape(1, N, C // N, C), "out_bias": leaves["out_bias"][None]}
        return {f"{prefix}/inner/{name}": leaf for name, leaf in (heads | biases | out).items()}

    def leaves(w: dict[str, Any], m: int) -> dict[str, Any]:
        flat = {name.rpartition("_")[0]: leaf for name, leaf in w.items()}
        own = {name: flat[name] for name in flat if not name.startswith("cross_")}
        for part in ("query", "value"):
            own[part] = own[part] + w[f"a_{part}_mCr"][m] @ w[f"b_{part}_mrC"][m]
        cross = {name.removeprefix("cross_"): leaf for name, leaf in flat.items() if name.startswith("cross_")}
        norms = {"norm": "norm0", "self_attention/norm": "norm1", "cross_attention/norm": "norm2", "mlp/norm": "norm3"}
        pairs = {f"{path}/{kind}": w[f"{name}_{'C' if kind == 'scale' else 'shift_C'}"]
                 for path, name in norms.items() for kind in ("scale", "bias")}  # fmt: skip
        return {
            **attention(own, "self_attention"), **attention(cross, "cross_attention"),
            **{path: leaf if path.startswith("norm") else leaf[None] for path, leaf in pairs.items()},
            "mlp/inner/up": w["up_CJ"][None], "mlp/inner/up_bias": w["up_bias_J"][None],
            "mlp/inner/down": w["down_JC"][None], "mlp/inner/down_bias": w["down_bias_C"][None],
            "queries": w["queries_mqC"][m], "out": w["project_mCD"][m], "out_bias": w["project_bias_mD"][m],
        }  # fmt: skip

    return module, leaves


def loss_of_fusion(tokens_mBtqD: jax.Array, trained: dict[str, Any], cotangent_BtqD: np.ndarray) -> jax.Array:
    """Of CREMA's fusion: the other modalities' tokens, gated by themselves, added to the first one's."""
    main, *assisting, last = tokens_mBtqD
    assisting = jnp.stack([*assisting, jnp.broadcast_to(last.mean(axis=1, keepdims=True), last.shape)])
    u_BtqD = jnp.einsum("mBtqD,mDd->Btqd", assisting, trained["fuse_mDd"]) + trained["fuse_bias_d"][None, None, None]
    return (fused(main, u_BtqD) * cotangent_BtqD).sum()


@pytest.mark.slow
def test_crema_resampler_and_its_gradients(folder: Path):
    given = arrays(folder, "crema")
    module, leaves_of = resampler(given)
    features_mBtSc = given["features_mBtSc"]
    M, B, t, S, c = features_mBtSc.shape
    trained = {name.removeprefix("d_"): given[name.removeprefix("d_")] for name in given if name.startswith("d_")}

    def tokens(w: dict[str, Any]) -> jax.Array:
        of_all = [with_arrays(module, leaves_of(w, m))(features_mBtSc[m].reshape(B * t, S, c)) for m in range(M)]
        return jnp.stack(of_all).reshape(M, B, t, *of_all[0].shape[1:])

    @jax.jit
    @jax.value_and_grad
    def loss(trained: dict[str, Any]) -> jax.Array:
        return loss_of_fusion(tokens({**given, **trained}), trained, given["cotangent_BtqD"])

    np.testing.assert_allclose(jax.jit(tokens)(given), given["tokens_mBtqD"], atol=SIMPLE, rtol=0)
    value, gradients = loss(trained)
    np.testing.assert_allclose(value, given["loss"], rtol=1e-5, atol=SIMPLE)
    for name, gradient in gradients.items():
        np.testing.assert_allclose(gradient, given[f"d_{name}"], atol=SIMPLE, rtol=1e-5, err_msg=name)


def test_unimoe_frames(folder: Path):
    given = arrays(folder, "unimoe")
    B, t, P, D = given["frames_BtPD"].shape
    joined_BPD = join_frames(jnp.asarray(given["frames_BtPD"]).reshape(B * t, P, D), frames=t, join="mean")
    np.testing.assert_allclose(joined_BPD, given["video_BPD"], atol=SIMPLE, rtol=0)
