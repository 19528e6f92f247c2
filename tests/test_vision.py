"""The vision tower equals transformers' CLIP, runs only the layers it needs, and lets gradients through."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from moextend_jax.checkpoints import names
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.config import DecoderConfig, ProjectorConfig, VisionConfig, of_pictures
from moextend_jax.mesh import make_mesh
from moextend_jax.models import vision
from moextend_jax.models.moextend import abstract, fresh_projector
from moextend_jax.models.projectors import Projector, make_projector
from moextend_jax.models.vision import VisionTower
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.sharding import parameter_shardings

CLIP = Path(__file__).parents[2] / "shared" / "oracle" / "clip"
TINY_CLIP = Path(__file__).parent / "data" / "clip.npz"
"""A tiny CLIPVisionModel of transformers with its outputs, made by data/make_clip.py: runs anywhere."""


def load(tensors: dict[str, np.ndarray], config: VisionConfig) -> VisionTower:
    """A tower with a file's tensors; an assertion fails unless both sides match one to one."""
    left = dict(tensors)
    stacks: dict[str, list[np.ndarray]] = {}
    for row in names.tensors("clip", of_pictures(decoder=DecoderConfig(), vision=config)):
        letters = {} if "h w" in row.layout else config.sizes()
        array = einops.rearrange(left.pop(row.file), row.layout, **names.axis_sizes(row.layout, letters))
        stacks.setdefault(row.path.removeprefix("media/image/tower/"), []).append(array)
    assert not left
    tower = nnx.eval_shape(lambda: VisionTower(config, rngs=nnx.Rngs(0), dtype="float32"))
    arrays = {path: jnp.asarray(np.stack(s) if path.startswith("layers") else s[0]) for path, s in stacks.items()}
    for path, param in by_path(nnx.state(tower)).items():
        assert param.shape == arrays[path].shape, path
    tower = with_arrays(tower, arrays)
    assert isinstance(tower, VisionTower)
    return tower


def clip(config: dict) -> VisionConfig:
    return VisionConfig(
        width=config["hidden_size"],
        hidden=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        norm_eps=config["layer_norm_eps"],
        activation=config["hidden_act"],
    )


def with_feature_layer(tower: VisionTower, feature_layer: int) -> VisionTower:
    graph, state = nnx.split(tower)
    copy = nnx.merge(graph, state)
    copy.config = dataclasses.replace(tower.config, feature_layer=feature_layer)
    return copy


def pooled(tower: VisionTower, images_nhwc: jax.Array) -> jax.Array:
    """The class token of the last layer after the final norm, x_nC: what CLIP's contrastive training reads."""
    return tower.post_norm(tower.hidden_state(images_nhwc, layer=-1)[:, :1])[:, 0]


def check_parity(tower: VisionTower, oracle: dict[str, np.ndarray]) -> None:
    last = with_feature_layer(tower, -1)

    @jax.jit
    def compute(pixels: jax.Array) -> dict[str, jax.Array]:
        pixels_nhwc = einops.rearrange(pixels, "n c h w -> n h w c")
        depths = range(tower.config.layers + 1)
        hidden = {f"hidden_states/{u}": tower.hidden_state(pixels_nhwc, layer=u) for u in depths}
        features = {"patch_m1": last(pixels_nhwc), "patch_m2": tower(pixels_nhwc)}
        return hidden | features | {"pooler_output": pooled(tower, pixels_nhwc)}

    if "patch_m1" not in oracle:
        depth = tower.config.layers
        both = {f"patch_m{m}": oracle[f"hidden_states/{depth + 1 - m}"][:, 1:] for m in (1, 2)}
        oracle = oracle | both

    for prefix in ("", "rand/"):
        ours = compute(oracle[prefix + "pixel_values"]) if prefix + "pixel_values" in oracle else {}
        compared = [name for name in ours if prefix + name in oracle]
        for name in compared:
            np.testing.assert_allclose(ours[name], oracle[prefix + name], atol=1e-5, rtol=0, err_msg=name)
        assert prefix or len(compared) == tower.config.layers + 4


def test_parity_with_transformers_three_layers():
    arrays = read_npz(TINY_CLIP)
    names = [name for name in arrays if name.startswith("vision_model.")]
    tensors = {name: arrays.pop(name) for name in names}
    check_parity(load(tensors, clip(json.loads(str(arrays.pop("config"))))), arrays)


@pytest.mark.skipif(not CLIP.is_dir(), reason="no oracle folder beside the repository")
def test_parity_with_the_whole_oracle():
    config = clip(json.loads((CLIP / "config.json").read_text()))
    check_parity(load(load_file(CLIP / "model.safetensors"), config), read_npz(CLIP.with_suffix(".npz")))


TINY = VisionConfig(width=16, hidden=24, layers=3, heads=2, image_size=12, patch_size=4)
IMAGES_nhwc = np.random.default_rng(1).normal(size=(2, 12, 12, 3)).astype(np.float32)


@functools.cache
def tiny() -> VisionTower:
    return nnx.jit(lambda: VisionTower(TINY, rngs=nnx.Rngs(0), dtype="float32"))()


def test_a_fresh_projector_makes_nothing_else_of_the_model():
    config = of_pictures(decoder=DecoderConfig(), vision=VisionConfig())  # 8x7B's
    traced = jax.make_jaxpr(functools.partial(fresh_projector, config), return_shape=True)(jax.random.key(0))
    jaxpr, leaves = traced
    wanted = {path: param.shape for path, param in by_path(nnx.state(abstract(config))).items() if "projector" in path}
    assert {path: leaf.shape for path, leaf in leaves.items()} == wanted
    assert max(math.prod(var.aval.shape) for equation in jaxpr.eqns for var in equation.outvars) == 4096 * 4096


def test_a_fresh_projector_lands_where_it_is_asked_for():
    config = of_pictures(decoder=DecoderConfig(width=20), vision=TINY)
    mesh = make_mesh({"data": 1, "fsdp": -1, "expert": 1, "tensor": 1})
    where = {
        p: s for p, s in parameter_shardings(abstract(config), mesh).items() if p.startswith("media/image/projector/")
    }
    leaves = jax.jit(functools.partial(fresh_projector, config), out_shardings=where)(jax.random.key(0))
    assert {path: leaf.sharding for path, leaf in leaves.items()} == where
    np.testing.assert_allclose(leaves["media/image/projector/second"].std(), (3 * 20) ** -0.5, rtol=0.1)
    assert not leaves["media/image/projector/first_bias"].any()


def test_rank_promotion_is_explicit():
    projector = make_projector(ProjectorConfig(), C=16, P=9, D=20, rngs=nnx.Rngs(1), dtype="float32")
    assert isinstance(projector, Projector)

    @nnx.jit
    def run(tower: VisionTower, projector: Projector, images_nhwc: jax.Array) -> tuple[jax.Array, ...]:
        x_nPC = tower(images_nhwc)
        return pooled(tower, images_nhwc), x_nPC, projector(x_nPC)

    with jax.numpy_rank_promotion("raise"):
        pooled_nC, x_nPC, x_nPD = run(tiny(), projector, jnp.asarray(IMAGES_nhwc))
    assert pooled_nC.shape == (2, 16) and x_nPC.shape == (2, 9, 16)
    first, second = (np.asarray(w[...]) for w in (projector.first, projector.second))
    h_nPD = np.asarray(x_nPC) @ first
    h_nPD = h_nPD * 0.5 * (1 + np.vectorize(math.erf)(h_nPD / math.sqrt(2)))
    np.testing.assert_allclose(x_nPD, h_nPD @ second, atol=1e-5)


def test_gradient_reaches_every_leaf_up_to_the_feature_layer_and_none_above():
    graph, state = nnx.split(tiny())

    def loss(state: nnx.State) -> jax.Array:
        return jnp.sum(jnp.sin(3 * nnx.merge(graph, state)(jnp.asarray(IMAGES_nhwc))))

    for path, param in nnx.to_flat_state(jax.jit(jax.grad(loss))(state)):
        size = np.abs(np.asarray(param[...]))
        if path[0] == "layers":
            by_layer = size.max(axis=tuple(range(1, size.ndim)))
            # A key bias shifts all scores of a query alike, which softmax takes away: zero but for rounding.
            assert "key_bias" in path or (by_layer[:2] > 1e-6).all(), path
            assert by_layer[2] == 0, path
        else:
            assert (size.max() > 1e-6) == (path[0] != "post_norm"), path


def test_bfloat16_stays_bfloat16_and_close():
    graph, state = nnx.split(tiny())
    half = nnx.merge(graph, jax.tree.map(lambda w: w.astype(jnp.bfloat16), state))
    run = nnx.jit(lambda tower, images_nhwc: tower(images_nhwc))
    x_nPC = run(half, jnp.asarray(IMAGES_nhwc))
    assert x_nPC.dtype == jnp.bfloat16
    np.testing.assert_allclose(x_nPC.astype(jnp.float32), run(tiny(), jnp.asarray(IMAGES_nhwc)), atol=0.05)


def test_positions_that_fill_up_change_nothing(monkeypatch: pytest.MonkeyPatch):
    """On a GPU there are some, so that products have even numbers of rows; nobody sees them."""
    tower, pixels = tiny(), jnp.asarray(IMAGES_nhwc)
    expected = tower.hidden_state(pixels, layer=-1)
    monkeypatch.setattr(vision, "platform", lambda: "gpu")
    program = jax.make_jaxpr(lambda pixels: tower.hidden_state(pixels, layer=-1))(pixels)
    assert f"{len(pixels)},{vision.EVEN},{tower.config.width}" in str(program)
    np.testing.assert_allclose(tower.hidden_state(pixels, layer=-1), expected, atol=1e-6, rtol=0)
