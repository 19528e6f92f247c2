"""Projectors: what each kind computes, how it starts, what it refuses, on one device and on eight."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiny import few

from moextend_jax.config import (
    DecoderConfig,
    FeaturesConfig,
    Medium,
    ModelConfig,
    MoextendError,
    Named,
    ProjectorConfig,
)
from moextend_jax.mesh import make_mesh, row_shards
from moextend_jax.models.flops import step_flops
from moextend_jax.models.projectors import Projector, Resampler, join_frames, make_projector
from moextend_jax.parameters import arrays_of, by_path, with_arrays
from moextend_jax.sharding import MESH_AXES, parameter_shardings

n, P, C, D = 2, 7, 8, 12
X_nPC = np.random.default_rng(0).normal(size=(n, P, C)).astype(np.float32)
CONFIGS = {
    "linear": ProjectorConfig(),
    "pool": ProjectorConfig(kind="pool", neighbours=3),
    "stack": ProjectorConfig(kind="stack", neighbours=3),
    "resampler": ProjectorConfig(kind="resampler", queries=5, layers=3, heads=2, cross_every=2),
}


def structure(config: ProjectorConfig) -> Projector | Resampler:
    make = functools.partial(make_projector, config, C=C, P=P, D=D, dtype="float32")
    return nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))


def drawn(module: nnx.Module, *, std: float = 0.3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        path: (path.endswith("scale") + rng.normal(0, std, param.shape)).astype(np.float32)
        for path, param in by_path(nnx.state(module, nnx.Param)).items()
    }


@functools.cache
def run(kind: str):
    module = structure(CONFIGS[kind])
    return jax.jit(lambda arrays, x_nPC: with_arrays(module, arrays)(x_nPC))


def two_maps(x_npC: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    h_npd = x_npC @ w["first"] + w["first_bias"]
    h_npd = h_npd * 0.5 * (1 + np.vectorize(math.erf)(h_npd / math.sqrt(2)))
    return h_npd @ w["second"] + w["second_bias"]


def in_threes(reduce) -> np.ndarray:
    """Positions 0 to 2, 3 to 5, and 6 alone."""
    return np.stack([reduce(X_nPC[:, start : start + 3]) for start in (0, 3, 6)], axis=1)


def side_by_side(group_npC: np.ndarray) -> np.ndarray:
    flat = group_npC.reshape(n, -1)
    return np.pad(flat, ((0, 0), (0, 3 * C - flat.shape[1])))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", X_nPC),
        ("pool", in_threes(lambda group_npC: group_npC.mean(axis=1))),
        ("stack", in_threes(side_by_side)),
    ],
)
def test_groups_of_neighbours_go_through_two_linear_maps(kind: str, expected: np.ndarray):
    w = drawn(structure(CONFIGS[kind]))
    tokens_npD = run(kind)(w, X_nPC)
    assert tokens_npD.shape == (n, CONFIGS[kind].tokens(P), D)
    np.testing.assert_allclose(tokens_npD, two_maps(expected, w), atol=1e-5)


def test_a_linear_projector_starts_as_pytorch_starts_one():
    leaves = arrays_of(make_projector(ProjectorConfig(), C=64, P=9, D=80, rngs=nnx.Rngs(3), dtype="float32"))
    assert list(leaves) == ["first", "first_bias", "second", "second_bias"]
    rngs = nnx.Rngs(3)
    for name, shape in (("first", (64, 80)), ("second", (80, 80))):
        drawn_first = jax.random.normal(rngs.params(), shape) * (3 * shape[0]) ** -0.5
        np.testing.assert_allclose(leaves[name], drawn_first, rtol=1e-6)
    assert not leaves["first_bias"].any() and not leaves["second_bias"].any()


# --- resampler --------------------------------------------------------------------------------------------------------


def test_resampler_equals_the_query_transformer_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = transformers.Blip2QFormerConfig(
        hidden_size=C, encoder_hidden_size=C, intermediate_size=4 * C, num_hidden_layers=3, num_attention_heads=2,
        cross_attention_frequency=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = transformers.Blip2QFormerModel(sizes).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, leaf in theirs.named_parameters():
            is_scale = name.lower().endswith("layernorm.weight")
            leaf.copy_(0.3 * torch.randn_like(leaf) + float(is_scale))
    file = {name: leaf.numpy() for name, leaf in theirs.state_dict().items()}

    def stack(template: str, layers: list[int]) -> np.ndarray:
        return np.stack([file[f"encoder.layer.{layer}.{template}"] for layer in layers])

    def attention(name: str, layers: list[int], prefix: str) -> dict[str, np.ndarray]:
        inner = {}
        for part in ("query", "key", "value"):
            weight = stack(f"{name}.attention.{part}.weight", layers).swapaxes(1, 2)
            inner[part] = weight.reshape(len(layers), C, 2, C // 2)
            inner[f"{part}_bias"] = stack(f"{name}.attention.{part}.bias", layers).reshape(len(layers), 2, C // 2)
        inner["out"] = stack(f"{name}.output.dense.weight", layers).swapaxes(1, 2).reshape(len(layers), 2, C // 2, C)
        inner["out_bias"] = stack(f"{name}.output.dense.bias", layers)
        return {f"{prefix}/inner/{leaf}": array for leaf, array in inner.items()} | norm(
            f"{name}.output", layers, prefix
        )

    def norm(name: str, layers: list[int], prefix: str) -> dict[str, np.ndarray]:
        pair = {"scale": "weight", "bias": "bias"}
        return {f"{prefix}/norm/{ours}": stack(f"{name}.LayerNorm.{t}", layers) for ours, t in pair.items()}

    every = [0, 1, 2]
    arrays = drawn(structure(CONFIGS["resampler"])) | {
        **attention("attention", every, "self_attention"),
        **attention("crossattention", [0, 2], "cross_attention"),
        "mlp/inner/up": stack("intermediate_query.dense.weight", every).swapaxes(1, 2),
        "mlp/inner/up_bias": stack("intermediate_query.dense.bias", every),
        "mlp/inner/down": stack("output_query.dense.weight", every).swapaxes(1, 2),
        "mlp/inner/down_bias": stack("output_query.dense.bias", every),
        **norm("output_query", every, "mlp"),
        "norm/scale": file["layernorm.weight"], "norm/bias": file["layernorm.bias"],
        "out": np.eye(C, dtype=np.float32), "out_bias": np.zeros(C, np.float32),
    }  # fmt: skip
    queries = torch.from_numpy(arrays["queries"])[None].expand(n, -1, -1)
    with torch.no_grad():
        expected = theirs(query_embeds=queries, encoder_hidden_states=torch.from_numpy(X_nPC)).last_hidden_state
    np.testing.assert_allclose(run("resampler")(arrays, X_nPC), expected.numpy(), atol=1e-5)


@pytest.mark.slow
def test_fifty_queries_are_fifty_tokens_and_every_leaf_learns():
    config = ProjectorConfig(kind="resampler", queries=50, layers=2, heads=2)
    module = make_projector(config, C=C, P=P, D=D, rngs=nnx.Rngs(0), dtype="float32")

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(arrays):
        tokens_nqD = with_arrays(module, arrays)(jnp.asarray(X_nPC))
        return jnp.sum(jnp.sin(3 * tokens_nqD)), tokens_nqD

    arrays = arrays_of(module)
    (_, tokens_nqD), gradients = loss(arrays)
    assert tokens_nqD.shape == (n, 50, D)
    for path, gradient in gradients.items():
        # A bias of keys shifts all scores of a query alike, which softmax takes away: zero but for rounding.
        assert "key_bias" in path or np.abs(gradient).max() > 1e-6, path
    assert len(np.unique(np.round(gradients["queries"], 7), axis=0)) == 50
    apart = np.abs(tokens_nqD[:, :, None] - tokens_nqD[:, None]).max(axis=-1) + np.eye(50)[None]
    assert apart.min() > 1e-2
    (_, tokens_nqD), gradients = loss(arrays | {"queries": jnp.zeros((50, C))})  # as released code starts them
    assert np.ptp(tokens_nqD, axis=1).max() < 1e-5 and np.ptp(gradients["queries"], axis=0).max() < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ProjectorConfig(neighbours=2), 'kind "linear" has neighbours = 2'),
        (ProjectorConfig(kind="pool", neighbours=8), "neighbours = 8 are more than the tower's 7 positions"),
        (ProjectorConfig(kind="resampler", heads=3), "heads = 3 must divide the tower's width 8"),
    ],
)
def test_refused(config: ProjectorConfig, message: str):
    with pytest.raises(MoextendError, match=message):
        structure(config)


def products_of(jaxpr: Any) -> float:
    """FLOPs of all matrix products of a program, also those of functions that it calls."""
    total = 0.0
    for one in jaxpr.eqns:
        if one.primitive.name == "dot_general":
            ((contracted, _), _), left = one.params["dimension_numbers"], one.invars[0].aval.shape
            total += 2.0 * math.prod(one.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        total += sum(map(products_of, jaxprs_in_params(one.params)))
    return total


@pytest.mark.parametrize("kind", CONFIGS)
def test_flops_are_those_of_the_products(kind: str):
    """Forward, and with the gradient of the projector's own leaves behind a frozen tower."""
    module, decoder = structure(CONFIGS[kind]), DecoderConfig(width=D)
    medium = Medium(kind="features", tower=FeaturesConfig(width=C, patches=P), projector=CONFIGS[kind])
    config = ModelConfig(decoder=decoder, media=Named({"x": medium}))
    parts = step_flops(config, trains=("media/x/projector/*",), rows=n, length=1, items={"x": 1}).parts
    own = [phases for name, phases in parts.items() if name.startswith("media/")]

    def total(arrays: Any) -> jax.Array:
        return with_arrays(module, arrays)(jnp.asarray(X_nPC)).sum()

    arrays = drawn(module)
    assert sum(of["forward"] for of in own) == products_of(jax.make_jaxpr(total)(arrays).jaxpr)
    assert sum(sum(of.values()) for of in own) == products_of(jax.make_jaxpr(jax.grad(total))(arrays).jaxpr)


def test_frames_of_a_video_one_after_another_or_their_mean():
    x_npD = jnp.asarray(X_nPC[:, :2])  # two frames of one video
    np.testing.assert_array_equal(join_frames(x_npD, frames=2, join="each"), x_npD.reshape(1, 4, C))
    np.testing.assert_allclose(join_frames(x_npD, frames=2, join="mean"), x_npD.mean(axis=0)[None], atol=1e-6)


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("kind", few(CONFIGS, *(kind for kind in CONFIGS if kind != "resampler")))
def test_tokens_and_gradients_do_not_depend_on_the_mesh(kind: str):
    module = structure(CONFIGS[kind])
    x_nPC = np.random.default_rng(2).normal(size=(8, P, C)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(arrays, x_nPC):
        tokens_npD = with_arrays(module, arrays)(x_nPC)
        return jnp.sum(jnp.sin(3 * tokens_npD)), tokens_npD

    arrays = drawn(module)
    mesh = make_mesh(dict(zip(MESH_AXES, (1, 2, 2, 2), strict=True)))
    (_, expected), _ = loss(arrays, x_nPC)
    # Added up part by part as on the mesh: where large parts cancel, rounding depends on the order of the sum.
    parts = [loss(arrays, part_nPC)[1] for part_nPC in np.split(x_nPC, row_shards(mesh))]
    expected_gradients = jax.tree.map(lambda *of_parts: sum(of_parts[1:], of_parts[0]), *parts)
    shardings = parameter_shardings(module, mesh)
    with jax.set_mesh(mesh):
        placed = {path: jax.device_put(leaf, shardings[path]) for path, leaf in arrays.items()}
        (_, tokens), gradients = loss(placed, x_nPC)
    np.testing.assert_allclose(tokens, expected, atol=1e-5)
    for path, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[path], gradient, atol=1e-5, rtol=1e-5, err_msg=path)
