"""How new experts start: what changes nothing changes nothing, alone, beside trained extensions, isolated, on a mesh
and with a cache; what learns at the first step; files say the start, and layouts that do not know it are refused."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharded
import tiny
from flax import nnx
from tiny import Talk, few, talks

from moextend_jax import cli
from moextend_jax.checkpoints import convert, train_state
from moextend_jax.checkpoints.loading import open_checkpoint
from moextend_jax.checkpoints.transformers_layout import export_transformers
from moextend_jax.config import (
    IGNORE,
    RECIPES,
    Batch,
    ExtensionConfig,
    ModelConfig,
    MoextendError,
    Named,
    StartName,
    with_extension,
)
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow
from moextend_jax.generate import Generator
from moextend_jax.mesh import place_rows
from moextend_jax.models.experts import apply_experts
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.router import Gate, NewColumns, Rule, bounded, over_their_sum, route, route_extended
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.models_of import grown_as
from moextend_jax.runs.ready import WIDE_TWIN, extension_problems
from moextend_jax.settings import EvaluateSettings, GrowSettings, RunSettings, SelectSettings, StageSettings
from moextend_jax.train import stages
from moextend_jax.train.loss import losses

PAPER = RECIPES["paper"]
EXACT: tuple[StartName, ...] = ("twin", "added")
STARTS: tuple[StartName, ...] = ("copy", "twin", "lowered", "added")
ROUNDING: dict[StartName, float] = {"twin": 2e-5, "added": 0.0}
"""By how much hidden states of size 1 may differ: a twin's rows go through another array of the same numbers."""
E, X_OF = tiny.DECODER.experts, {1: (1, 3), 2: (1, 2, 3, 0)}


def extension(start: StartName, *, new_experts: int = 1, **more: Any) -> ExtensionConfig:
    return dataclasses.replace(
        tiny.EXTENSION, start=start, **{"new_experts": new_experts, "sources": X_OF[new_experts], **more}
    )


def grown(
    config: ModelConfig, arrays: dict[str, jax.Array], *, name: str = "image", **more: Any
) -> dict[str, jax.Array]:
    """The arrays with those of an extension as `grow` makes them."""
    return arrays | grow(arrays, config=config, recipe=PAPER, seed=0, name=name, **more)


@functools.cache
def program(config: ModelConfig) -> Any:
    model = tiny.structure(config)
    return jax.jit(lambda arrays, batch: with_arrays(model, arrays)(batch)[:2])


def decoded(config: ModelConfig, arrays: dict[str, jax.Array], batch: Batch) -> Any:
    return jax.tree.map(np.asarray, program(config)(arrays, batch))


def assert_kept(after_BLD: np.ndarray, before_BLD: np.ndarray, start: StartName) -> None:
    np.testing.assert_allclose(after_BLD, before_BLD, atol=ROUNDING[start], rtol=0)


BATCH = tiny.batch(rows=8, length=40)


# --- the first step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", few([{"new_experts": 2, "sources": (1, 1, 3, 3)}, {}, {"new_experts": 2}]))
@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_changes_nothing_changes_nothing(start: StartName, more: dict[str, Any]):
    """Also with two experts of one source, of which one is chosen at a time."""
    config, arrays = with_extension(tiny.PLAIN, extension(start, **more)), tiny.arrays(tiny.PLAIN)
    (before_BLD, before), (after_BLD, after) = (
        decoded(*of, BATCH) for of in ((tiny.PLAIN, arrays), (config, grown(config, arrays, lowered_by=0.3)))
    )
    new_Tk = (after.ids_Tk >= E) & (after.ids_Tk < config.outputs)
    assert new_Tk[list(tiny.EXTENSION.layers)].any(axis=(1, 2)).all() and not new_Tk[1].any()
    if start not in EXACT:
        assert np.abs(after_BLD - before_BLD).max() > 1e-2
        return
    assert_kept(after_BLD, before_BLD, start)
    ids_Tk, weights_Tk = after.ids_Tk[..., :2], after.weights_Tk[..., :2]
    sources = np.array([*range(E), *[-1] * (config.outputs - E)])
    for z, sources_X in zip(
        tiny.EXTENSION.layers, np.reshape(config.extensions["image"].sources, (2, -1)), strict=True
    ):
        sources[E:] = sources_X  # a twin is where its source was
        np.testing.assert_array_equal(sources[ids_Tk[z]], before.ids_Tk[z])
        assert len({*ids_Tk[z].flat} & {*range(E)}) > 1
    assert weights_Tk.tobytes() == before.weights_Tk.tobytes()


def slopes(config: ModelConfig, arrays: dict[str, jax.Array]) -> dict[str, float]:
    """Norms of the gradients of the extension's leaves."""
    trainable, frozen = stages.split(arrays, ("extensions/image/*",))
    model = stages.for_training(tiny.structure(config), trainable)

    @jax.jit
    def run(trainable):
        def total(trainable):
            whole = with_arrays(model, {**trainable, **frozen})
            return losses(whole, BATCH, recipe=PAPER, aux_coefficient=0.0, chunk=64)[0].total

        return jax.grad(total)(trainable)

    return {
        path.removeprefix("extensions/image/"): float(jnp.linalg.norm(leaf)) for path, leaf in run(trainable).items()
    }


@pytest.mark.parametrize(
    "calibrator",
    few(["vector", "vector_multiplied", "none", "two_layers_multiplied"]),
)
def test_other_calibrators_begin_as_the_papers_does_but_for_one_and_learn(calibrator: Any):
    """The one that is two layers, multiplied, starts at random: in the paper it diverged."""

    def trained(name: Any) -> tuple[ModelConfig, dict[str, jax.Array]]:
        config = with_extension(tiny.PLAIN, extension("copy", calibrator=name))
        return config, grown(config, tiny.arrays(tiny.PLAIN))

    papers_BLD, _ = decoded(*trained("two_layers"), BATCH)
    own_BLD, _ = decoded(*trained(calibrator), BATCH)
    same = np.abs(own_BLD - papers_BLD).max() == 0
    assert same != (calibrator == "two_layers_multiplied")
    norms = {path: norm for path, norm in slopes(*trained(calibrator)).items() if "calibrator" in path}
    leaves = {"none": set(), "two_layers_multiplied": {"w_in", "w_out"}}.get(calibrator, {"vector"})
    assert {path.rpartition("/")[2] for path in norms} == leaves
    assert all(norm > 1e-4 for norm in norms.values())


@pytest.mark.parametrize(
    ("start", "still"),
    [
        pytest.param("twin", {"router/calibrator/w_in"}, marks=pytest.mark.slow),
        ("added", {"router/calibrator/w_in", "router/new_gate", "new_experts/w_gate", "new_experts/w_up"}),
    ],
)
def test_what_learns_at_the_first_step(start: StartName, still: set[str]):
    """Behind a matrix of zeros nothing does: w_in behind the calibrator's w_out, and what is behind a new w_down."""
    config = with_extension(tiny.PLAIN, extension(start))
    norms = slopes(config, grown(config, tiny.arrays(tiny.PLAIN)))
    assert {path for path, norm in norms.items() if not norm} == still
    assert min(norm for norm in norms.values() if norm) > 1e-4


@pytest.mark.slow
def test_a_lowered_logit_moves_few_tokens_and_those_by_little():
    """Of k = 2 a token changes only where its source leads by more, and by sigmoid(-beta) of a difference at most."""
    rng, beta, source = np.random.default_rng(0), 1.5, 2
    x_TD, gate_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3000, 6), (6, 8)))
    columns = one_layer(gate_DE[:, source : source + 1], start="lowered", offset=-beta)
    base = route(x_TD, gate_DE, rule=Rule(2))
    ours = route_extended(x_TD, gate_DE, [columns], rule=Rule(2), normalise=over_their_sum)
    np.testing.assert_allclose(ours.logits_TO[:, 8], base.logits_TO[:, source] - beta, atol=1e-6)
    logits_T2 = np.sort(np.asarray(base.logits_TO), axis=1)[:, -2:]
    moved_T = (np.asarray(ours.ids_Tk) == 8).any(axis=1)
    lead_T = np.asarray(base.logits_TO)[:, source] - logits_T2[:, 0]
    np.testing.assert_array_equal(moved_T, lead_T > beta)
    assert 0.01 < moved_T.mean() < 0.2
    given_up_T = np.asarray(base.weights_Tk)[moved_T, 1]  # the weight of the expert that the copy takes the place of
    assert given_up_T.max() <= 1 / (1 + np.exp(beta))


def one_layer(
    new_gate_DX: jax.Array, *, start: StartName, offset: float = 0.0, bias_X: jax.Array | None = None, width: int = 3
) -> NewColumns:
    """New columns of one layer whose calibrator is the identity."""
    D, X = new_gate_DX.shape
    decoder = dataclasses.replace(tiny.DECODER, width=D, experts=8, selection_bias=bias_X is not None)
    added = ExtensionConfig(layers=(0,), sources=(0,) * X, new_experts=X, calibrator_width=width, start=start)
    made = nnx.eval_shape(lambda: NewColumns(decoder, added, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    O = 8 + X  # noqa: E741
    arrays = {"new_gate": new_gate_DX, "calibrator/w_in": jnp.ones((O, width))}
    arrays["calibrator/w_out"] = jnp.zeros((width, O))
    if start == "lowered":
        arrays["offset"] = jnp.full(X, offset)
    if bias_X is not None:
        arrays["new_bias"] = bias_X
    return with_arrays(made, arrays)


@pytest.mark.slow
@pytest.mark.parametrize("rule", [Rule(3, normalised=False), Rule(2, scores="sigmoid", routed_factor=2.5, groups=2)])
@pytest.mark.parametrize("start", EXACT)
def test_so_it_is_in_families_of_other_weights(start: StartName, rule: Rule):
    """Weights that do not sum to one, sigmoid scores with a bias, groups of experts. Of these numbers every processor's
    products are exact, whatever their width: else a twin's logit may differ from its source's in the last bit."""
    rng = np.random.default_rng(1)
    x_TD, gate_DE = (jnp.round(rng.normal(size=shape).astype(np.float32) * 128) / 128 for shape in ((300, 6), (6, 8)))
    bias_E = jnp.asarray(rng.normal(size=8) * 0.2, jnp.float32) if rule.scores == "sigmoid" else None
    sources_X = jnp.array([5, 2])
    columns = one_layer(gate_DE[:, sources_X], start=start, bias_X=None if bias_E is None else bias_E[sources_X])
    gate = Gate(gate_DE, selection_E=bias_E)
    base = route(x_TD, gate, rule=rule)
    ours = route_extended(x_TD, gate, [columns], rule=rule, normalise=bounded, sources=[sources_X])
    k = rule.top_k
    as_source_Tk = np.array([*range(8), 5, 2])[ours.ids_Tk[:, :k]]
    np.testing.assert_array_equal(as_source_Tk, base.ids_Tk)
    np.testing.assert_allclose(ours.weights_Tk[:, :k], base.weights_Tk, atol=1e-6 if rule.scores == "sigmoid" else 0)
    assert np.asarray(ours.ids_Tk >= 8).any() and np.isin(ours.ids_Tk, [8, 9]).any(axis=1).mean() < 1
    assert ours.ids_Tk.shape[1] == k + (2 if start == "added" else 0)
    if ours.selection_TO is not None:
        assert np.isneginf(ours.selection_TO).sum() >= 300 * 4 * (rule.groups > 1)
        assert ours.selection_TO.shape == ours.logits_TO.shape == (300, 10)


# --- beside others ----------------------------------------------------------------------------------------------------


SOUND = tiny.BOTH.extensions["sound"]  # two new experts in layers 1 and 2, of these sources:
EACH = [[Talk(1, ("image",)), Talk(2, ("sound",))], [Talk(3, ("image", "sound"))], [Talk(4)], [Talk(5, ("sound",))]]


@pytest.mark.parametrize("start", few(EXACT))
@pytest.mark.parametrize("before", few(STARTS, "lowered"))
def test_a_trained_extension_of_any_start_stays_what_it_was_beside_a_new_one(before: StartName, start: StartName):
    """Its calibrators are no longer the identity, its columns no longer copies; both extend the last layer."""
    with_image = with_extension(tiny.BOTH, None, name="sound")
    with_image = with_extension(with_image, extension(before, new_experts=2))
    with_both = with_extension(with_image, dataclasses.replace(SOUND, start=start, sources=(0, 2, 1, 3)), name="sound")
    arrays, batch = tiny.arrays(with_image), talks(*EACH, length=24)
    (before_BLD, routed), (after_BLD, after) = (
        decoded(*of, batch) for of in ((with_image, arrays), (with_both, grown(with_both, arrays, name="sound")))
    )
    assert (routed.ids_Tk >= E).any() and (after.ids_Tk >= E + 2).any()
    difference = np.abs(after_BLD - before_BLD)[batch.segments_BL > 0]
    assert difference.max() <= ROUNDING[start], difference.max()


@pytest.mark.parametrize("composition", ["shared", "decoupled"])
@pytest.mark.parametrize("start", few(STARTS, "twin"))
def test_text_that_may_not_choose_them_is_the_base_s(start: StartName, composition: Any):
    """Leaves as training leaves them. Batches without the medium run the base's program; beside it the tokens do."""
    config = dataclasses.replace(
        with_extension(tiny.PLAIN, extension(start, new_experts=2)), text_isolation="strict", composition=composition
    )
    arrays = tiny.arrays(config, std=0.2)
    plain = {path: leaf for path, leaf in arrays.items() if not path.startswith("extensions/")}
    text = talks([Talk(3)], [Talk(4)])._replace(media={}, features={})
    assert decoded(config, arrays, text)[0].tobytes() == decoded(tiny.PLAIN, plain, text)[0].tobytes()
    (ours_BLD, ours), (base_BLD, base) = decoded(config, arrays, BATCH), decoded(tiny.PLAIN, plain, BATCH)
    blind_BL = ~(BATCH.places_BL >= 0).any(axis=1, keepdims=True) & (BATCH.segments_BL > 0)
    assert 0 < blind_BL.mean() < 1
    np.testing.assert_allclose(ours_BLD[blind_BL], base_BLD[blind_BL], atol=1e-5, rtol=0)
    blind_T = blind_BL.reshape(-1)
    np.testing.assert_array_equal(ours.ids_Tk[:, blind_T, :2], base.ids_Tk[:, blind_T])
    assert (ours.ids_Tk[:, blind_T, 2:] == config.outputs).all()
    assert (ours.ids_Tk[:, ~blind_T] >= E).any()


@pytest.mark.parametrize("start", few(STARTS, "copy", "added"))
def test_a_share_of_nothing_takes_them_out(start: StartName):
    config = with_extension(tiny.PLAIN, extension(start, share=0.0))
    arrays = tiny.arrays(config)
    plain = {path: leaf for path, leaf in arrays.items() if not path.startswith("extensions/")}
    assert decoded(config, arrays, BATCH)[0].tobytes() == decoded(tiny.PLAIN, plain, BATCH)[0].tobytes()


# --- on a mesh, with a cache ------------------------------------------------------------------------------------------


@functools.cache
def all_starts(dispatch: Any) -> ModelConfig:
    """A twin and added experts in one model, two of each, the added three times as wide as the base's."""
    config = with_extension(test_sharded.MODEL, extension("twin", new_experts=2))
    wide = ExtensionConfig(
        layers=(1, 2), sources=(0, 2, 1, 1, 3, 0) * 2, new_experts=2, calibrator_width=4, start="added", wide=3
    )
    lowered = dataclasses.replace(tiny.EXTENSION, start="lowered", sources=(3, 3))
    config = with_extension(with_extension(config, wide, name="wide"), lowered, name="lowered")
    return dataclasses.replace(config, dispatch=dispatch)


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize(("shape", "dispatch"), [("no data", "gather"), ("expert", "exchange")])
def test_losses_gradients_and_routing_do_not_depend_on_the_mesh(dispatch: Any, shape: str):
    model = all_starts(dispatch)
    trained = ("extensions/*", "decoder/layers/moe/gate")

    def run(arrays, batch, mesh=None):
        trainable, frozen = stages.split(arrays, trained)
        structure = stages.for_training(tiny.structure(model), trainable)

        @jax.jit
        def slope(trainable, frozen, batch):
            def total(trainable):
                found, routing = losses(
                    with_arrays(structure, {**trainable, **frozen}), batch, recipe=PAPER, aux_coefficient=0.01, chunk=5
                )
                return found.total, routing

            return jax.value_and_grad(total, has_aux=True)(trainable)

        return slope(trainable, frozen, batch)

    batch = test_sharded.BATCHES[0]
    (expected, routed), slope = run(tiny.arrays(model), batch)
    mesh, arrays = test_sharded.sharded(test_sharded.MESHES[shape], model)
    with jax.set_mesh(mesh):
        (got, on_mesh), on_mesh_slope = run(arrays, place_rows(batch, mesh))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(on_mesh.ids_Tk, routed.ids_Tk)
    assert {E + n for n in range(5)} <= {*np.asarray(routed.ids_Tk).flat}
    for path, leaf in slope.items():
        np.testing.assert_allclose(on_mesh_slope[path], leaf, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.parametrize("start", few(["added", "twin"]))
def test_a_cached_answer_equals_running_the_whole_model_for_each_token(start: StartName):
    config = with_extension(tiny.PLAIN, extension(start, new_experts=2))
    arrays = tiny.arrays(config)
    arrays["decoder/embed"] = arrays["decoder/embed"] * 2  # livelier answers
    structure = tiny.structure(config)

    @jax.jit
    def logits(batch: Batch):
        whole = with_arrays(structure, arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    prompt = tiny.batch(rows=1)
    prompt = jax.tree.map(jnp.asarray, prompt._replace(labels_BL=np.full_like(prompt.labels_BL, IGNORE)))
    answer = tiny.complete(Generator(structure, eos=-1), arrays, prompt, max_new_tokens=5)[0]
    assert len({*answer}) > 2
    length = prompt.ids_BL.shape[1]
    ids_L = np.concatenate([np.asarray(prompt.ids_BL)[0], answer]).astype(np.int32)
    whole = prompt._replace(
        ids_BL=ids_L[None], labels_BL=np.full((1, length + 5), IGNORE, np.int32),
        positions_BL=np.arange(length + 5, dtype=np.int32)[None], segments_BL=np.ones((1, length + 5), np.int32),
        places_BL=np.concatenate([np.asarray(prompt.places_BL), np.full((1, 5), -1, np.int32)], axis=1),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(logits(whole))[0, length - 1 : -1].argmax(axis=-1), answer)


# --- wide experts -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_wide_expert_is_the_mean_of_its_sources_and_starts_with_the_first_s_column():
    added = extension("copy", wide=2, sources=(1, 2, 3, 0))
    config, arrays = with_extension(tiny.PLAIN, added), tiny.arrays(tiny.PLAIN)
    leaves = grow(arrays, config=config, recipe=PAPER, seed=0)
    D, F = tiny.DECODER.width, tiny.DECODER.hidden
    assert leaves["extensions/image/new_experts/w_up"].shape == (2, 1, D, 2 * F)
    x_TD = jax.random.normal(jax.random.key(0), (50, D))
    names, ones_T1 = ("w_gate", "w_up", "w_down"), jnp.ones((50, 1))

    def output(weights, number: int) -> jax.Array:
        return apply_experts(x_TD, jnp.full((50, 1), number), ones_T1, [tuple(weights)])

    for y, (layer, sources) in enumerate([(0, (1, 2)), (2, (3, 0))]):
        pretrained = [arrays[f"decoder/layers/moe/experts/{name}"][layer] for name in names]
        wide = output([leaves[f"extensions/image/new_experts/{name}"][y] for name in names], 0)
        mean = (output(pretrained, sources[0]) + output(pretrained, sources[1])) / 2
        np.testing.assert_allclose(wide, mean, atol=2e-5)
        assert np.abs(mean - output(pretrained, sources[0])).max() > 0.1
        column = leaves["extensions/image/router/new_gate"][y, :, 0]
        np.testing.assert_array_equal(column, arrays["decoder/layers/moe/gate"][layer, :, sources[0]])
    assert tiny.structure(config).extensions["image"].new_experts.w_up.shape == (2, 1, D, 2 * F)
    assert isinstance(tiny.structure(config), MoExtend)


def test_added_experts_may_be_wide_and_change_nothing():
    config, arrays = (
        with_extension(tiny.PLAIN, extension("added", wide=2, sources=(1, 2, 3, 0))),
        tiny.arrays(tiny.PLAIN),
    )
    before_BLD, _ = decoded(tiny.PLAIN, arrays, BATCH)
    assert decoded(config, grown(config, arrays), BATCH)[0].tobytes() == before_BLD.tobytes()


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = ModelConfig(decoder=folders.MANY.decoder, dtype="float32")
    return folders.mixtral(tmp_path_factory.mktemp("base") / "base", config=plain, dtype="float32")


def of_start(**more: Any) -> ModelConfig:
    added = dataclasses.replace(tiny.EXTENSION, **more)
    medium = folders.MANY.media["image"]
    return dataclasses.replace(
        folders.MANY, media=Named(image=medium), extensions=Named(image=added), composition="shared"
    )


@pytest.mark.parametrize(
    "more",
    [
        {"start": "twin"}, {"start": "lowered"}, {"start": "added"}, {"wide": 2, "sources": (1, 0, 3, 2)},
        {"calibrator": "vector_multiplied"}, {"calibrator": "none"},
    ],
)  # fmt: skip
def test_folders_and_deltas_say_how_an_extension_started(more: dict[str, Any], base: Path, tmp_path: Path):
    config = of_start(**more)
    convert.import_source(folders.source_of(config, recipe=dataclasses.asdict(PAPER)), tmp_path / "whole")
    opened = open_checkpoint(tmp_path / "whole", dtype="float32")
    assert opened.config.extensions == config.extensions
    cli.call(["export", str(tmp_path / "whole"), str(tmp_path / "delta"), "--layout", "delta"])
    record = json.loads((tmp_path / "delta" / "moextend.json").read_text())["model"]["extensions"]["image"]
    plain = {"start": "copy", "wide": 1, "calibrator": "two_layers"}
    assert {name: record[name] for name in plain} == plain | {
        name: value for name, value in more.items() if name != "sources"
    }
    vision = tmp_path / "tower"
    leaves = {path: leaf for path, leaf in folders.source_of(config).leaves.items() if "/tower/" in path}
    convert.import_source(folders.source_of(config)._replace(leaves=leaves), vision)
    words = ["compose", str(base), str(tmp_path / "delta"), str(tmp_path / "again"), "--rule", "shared"]
    cli.call([*words, "--vision", str(vision)])
    again = open_checkpoint(tmp_path / "again", dtype="float32")
    assert again.config.extensions == config.extensions
    folders.assert_same(again.arrays, folders.arrays(config, dtype=np.float32))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"start": "twin"}, "the start 'twin' of extension image"),
        ({"start": "lowered"}, "the start 'lowered' of extension image"),
        ({"start": "added"}, "the start 'added' of extension image"),
        ({"wide": 2, "sources": (1, 0, 3, 2)}, "experts 2 times as wide in extension image"),
        ({"calibrator": "vector"}, "the calibrator 'vector' of extension image"),
    ],
)
def test_the_released_layout_refuses_what_the_released_code_does_not_compute(
    more: dict[str, Any], told: str, tmp_path: Path
):
    source = folders.source_of(of_start(**more))
    with pytest.raises(
        MoextendError, match=f"layout released .* this model has {re.escape(told)}: export it with --layout delta"
    ):
        convert.export_source(source, tmp_path / "out", layout="released", max_shard_bytes=1 << 30)
    assert not (tmp_path / "out").exists()


def test_twins_go_through_the_layout_of_transformers(tmp_path: Path):
    twins = {"start": "twin", "new_experts": 2, "sources": (1, 3, 0, 0)}
    config, recipe = of_start(**twins), dataclasses.replace(PAPER, feature_layer=-1)
    source = folders.source_of(config, recipe=dataclasses.asdict(recipe))
    export_transformers(source, tmp_path / "hf", recipe=recipe, max_shard_bytes=1 << 30)
    opened = open_checkpoint(tmp_path / "hf", dtype="float32")
    assert opened.config.extensions == config.extensions
    folders.assert_same(opened.arrays, folders.arrays(config, dtype=np.float32))
    at = tmp_path / "hf" / "config.json"
    written = json.loads(at.read_text())
    for wrong, told in (
        ({"sources": [1, 3, 0, 9]}, r"sources \(1, 3, 0, 9\) are"), ({"sources": [1, 3]}, "2 layers copy 2 experts"),
        ({"sources": [1, 3, 0, -1]}, "twins of sources"), ({"start": "other"}, "image.start = 'other' is not"),
        ({"wide": 0}, "has 0 sources of an expert"), ({"name": "A b"}, "'A b' is no name"),
    ):  # fmt: skip
        at.write_text(json.dumps(written | {"extensions": [written["extensions"][0] | wrong]}))
        with pytest.raises(MoextendError, match=rf"config\.json: extensions: .*{told}"):
            open_checkpoint(tmp_path / "hf", dtype="float32")


def modeling() -> Any:
    """The code that goes along with an exported folder."""
    pytest.importorskip("transformers")
    path = tiny.ASSETS / "hf" / "modeling_moextend.py"
    spec = importlib.util.spec_from_file_location("modeling_moextend", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TWINS: dict[str, Any] = {"start": "twin", "sources": (2, 5, 2)}
CHAINS: dict[str, tuple[dict[str, Any], ...]] = {
    "twins": (TWINS,),  # two of the three of one source
    "all": (
        TWINS, {"layer": 1, "sources": (0,)}, {"sources": (1, 3)}, {"start": "added", "sources": (4, 6), "share": 0.5},
        {"start": "twin", "sources": (5,)}, {"start": "lowered", "sources": (7,), "share": 0.9},
        {"start": "added", "sources": (0,)},
    ),
}  # fmt: skip
"""Extensions of one model, all but one of layer 0."""


@pytest.mark.parametrize("sighted", [False, True])
@pytest.mark.parametrize(
    ("chain", "rule", "bias"),
    [
        ("twins", Rule(2), 0.0),
        ("all", Rule(3), 0.0),
        ("all", Rule(3), 0.02),
        ("all", Rule(3, "sigmoid", routed_factor=2.5, groups=4, top_groups=2), 0.1),
    ],
    ids=["twins", "all", "softmax, biased", "biased"],
)
def test_the_code_that_goes_along_chooses_as_we_do(chain: str, rule: Rule, bias: float, sighted: bool):
    """In PyTorch on our leaves, trained calibrators; each extension is open to tokens of its own. bias: the spread of
    that which chooses experts."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs, rng, of_chain, biased = modeling(), np.random.default_rng(5), CHAINS[chain], bias > 0

    def drawn(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(size=shape, scale=scale).astype(np.float32)

    x_TD, gate_DE, bias_E = drawn(400, 6), drawn(6, 8), drawn(8, scale=bias) if biased else None
    sizes = {"name": "", "medium": "image", "share": 1.0, "start": "copy", "wide": 1, "calibrator_width": 4}
    listed = [{**sizes, "layers": [own.get("layer", 0)], "new_experts": len(own["sources"]), **own} for own in of_chain]
    text = transformers.MixtralConfig(hidden_size=6, num_local_experts=8, num_experts_per_tok=rule.top_k)
    router = {"experts": 8, **rule._asdict(), "bias": False, "selection_bias": biased}
    expert = {"width": 2, "bias": False, "glu": "silu", "glu_limit": 7.0}
    config = theirs.MoExtendConfig(text_config=text, extensions=listed, router=router, expert=expert)
    extensions, slots, shares = theirs.Extensions(config, 0), [], []
    for n, own in enumerate(listed):
        X = own["new_experts"]
        new_DX = gate_DE[:, own["sources"]] + drawn(6, X, scale=0.3)
        bias_X = drawn(X, scale=bias) if biased else None
        w_in_OA, w_out_AO = drawn(8 + X, 4), drawn(4, 8 + X, scale=0.1)
        open_T = rng.random(400) < 0.5 if sighted else np.ones(400, bool)
        slot = one_layer(
            jnp.asarray(new_DX), start=own["start"], width=4, offset=-0.3,
            bias_X=None if bias_X is None else jnp.asarray(bias_X),
        )  # fmt: skip
        slot.calibrator.w_in[...], slot.calibrator.w_out[...] = jnp.asarray(w_in_OA), jnp.asarray(w_out_AO)
        slots.append(slot)
        shares.append(jnp.where(open_T, np.log(own["share"]), -jnp.inf))
        if str(n) not in extensions:
            continue
        leaves = {"gate.weight": new_DX, "calibrator.0.weight": w_in_OA, "calibrator.2.weight": w_out_AO}
        leaves |= {} if bias_X is None else {"selection_bias": bias_X}
        leaves |= {"offset": np.full(X, -0.3, np.float32)} if own["start"] == "lowered" else {}
        state = {name: torch.tensor(leaf.T.copy()) for name, leaf in leaves.items()}
        extensions[str(n)].load_state_dict(state, strict=False)
        extensions[str(n)].shares = torch.tensor(open_T * own.get("share", 1.0)) if sighted else None
    with torch.no_grad():
        given = torch.tensor(x_TD), torch.tensor(x_TD @ gate_DE), None if bias_E is None else torch.tensor(bias_E)
        logits, weights, ids = (array.numpy() for array in extensions(*given))
    ours = route_extended(
        jnp.asarray(x_TD), Gate(jnp.asarray(gate_DE), None, None if bias_E is None else jnp.asarray(bias_E)), slots,
        rule=rule, normalise=bounded, sources=[jnp.array(own["sources"]) for own in listed], shares=shares,
        extended=[0 in own["layers"] for own in listed],
    )  # fmt: skip
    np.testing.assert_allclose(logits, ours.logits_TO, atol=1e-5)
    np.testing.assert_allclose(weights, ours.weights_Tk, atol=1e-5)
    chosen = weights != 0
    np.testing.assert_array_equal(ids[chosen], np.asarray(ours.ids_Tk)[chosen])
    columns = [n for n, own in enumerate(listed) for _ in own["sources"]]
    there = [8 + o for o, n in enumerate(columns) if str(n) in extensions]
    assert {*there} <= {*ids[chosen].flat} <= {*range(8), *there}
    closed = np.isneginf([shares[int(n)] for n in extensions]).all(axis=0)
    assert closed.any() == sighted and (ids[closed][chosen[closed]] < 8).all()


# --- settings ---------------------------------------------------------------------------------------------------------


STAGE = StageSettings(data="d", steps=1, batch_size=1, length=8)


def settings(**more: Any) -> RunSettings:
    evaluate = EvaluateSettings(data="d", questions=1)
    return RunSettings(align=STAGE, extend=STAGE, finetune=STAGE, full=STAGE, evaluate=evaluate, **more)


@pytest.mark.parametrize(
    ("new_experts", "number"),
    [(1 / 8, {8: 1, 4: 1, 60: 7, 64: 8, 128: 16}), (1, {8: 1, 128: 1}), (3, {8: 3}), (0.5, {8: 4})],
)
def test_new_experts_are_a_share_of_the_pretrained_or_a_number(new_experts: float, number: dict[int, int]):
    select = SelectSettings(new_experts=new_experts)
    assert {experts: select.number(experts) for experts in number} == number
    assert SelectSettings().new_experts == 1 / 8
    with pytest.raises(MoextendError, match=r"new_experts = 1\.5 is neither a share, below 1, nor a whole number of"):
        SelectSettings(new_experts=1.5)


def test_sources_are_the_most_picked_and_all_different():
    before = np.array([[50, 30, 20, 40], [10, 10, 80, 5], [40, 30, 35, 20]])
    counted = routing.Counts(before, 0 * before, 1, 1)
    after = counted._replace(text_ZO=before[:, ::-1])
    of = functools.partial(routing.select, counted, after, share=0.7, recipe=PAPER)
    assert of().layers == (1, 2) == of(new_experts=2).layers
    assert of(new_experts=2).sources == (2, 0, 0, 2)
    assert of(new_experts=2, wide=2).sources == (2, 1, 0, 3, 0, 1, 2, 3)  # the most picked are the first of one each
    assert of(wide=3).sources == (2, 0, 1, 0, 2, 1)
    with pytest.raises(MoextendError, match=r"new_experts = 2 times select\.wide = 3: .* a layer has 4"):
        of(new_experts=2, wide=3)


@pytest.mark.parametrize("name", ["extend", "select", "grow", "finetune"])
def test_what_cannot_be_extended_is_refused_before_the_first_step(name: str):
    def told(own: RunSettings, **decoder: Any) -> list[str]:
        return extension_problems(own, [name], decoder=dataclasses.replace(tiny.DECODER, **decoder))

    assert told(settings()) == told(settings(), top_k=1, normalised=False) == []
    (problem,) = told(settings(), top_k=1)
    assert "top_k = 1" in problem and "no gradient" in problem and "\n" not in problem
    assert extension_problems(settings(), ["align", "full"], decoder=dataclasses.replace(tiny.DECODER, top_k=1)) == []
    twins = settings(grow=GrowSettings(start="twin"), select=SelectSettings(wide=2))
    assert told(twins) == [WIDE_TWIN.format(2)]
    assert "a layer has 4" in told(settings(select=SelectSettings(new_experts=5)))[0]
    fixed = settings(select=SelectSettings(source="fixed", expert=99))
    assert told(fixed) == ["select.expert = 99: a layer has experts 0 to 3"]
    scored = dataclasses.replace(settings(select=SelectSettings(source="saliency")), expert_storage="int4")
    assert "scores need a gradient of the pretrained experts, which are int4" in told(scored)[0]


def test_a_row_of_several_conversations_is_seen_by_its_positions():
    """Strict isolation knows a conversation by its row; padding on the left is none."""
    torch = pytest.importorskip("torch")
    restarts = modeling().restarts
    left, mask = torch.tensor([[1, 1, 0, 1, 2]]), torch.tensor([[0, 0, 1, 1, 1]])
    packed = torch.tensor([[0, 1, 2, 0, 1]])
    assert not restarts(None, None) and not restarts(left, mask) and not restarts(left[:, -1:], mask)
    assert restarts(packed, None) and restarts(packed, torch.ones_like(packed)) and not restarts(packed, {"full": 1})


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_row_is_remembered_by_the_cache_under_either_of_its_names(name: str, monkeypatch: pytest.MonkeyPatch):
    """transformers 5.24 calls it otherwise than before."""
    torch, theirs = pytest.importorskip("torch"), modeling()
    model = theirs.MoExtendModel.__new__(theirs.MoExtendModel)
    torch.nn.Module.__init__(model)
    model.config = SimpleNamespace(text_isolation="strict", composition="shared")
    model.pads, model.extended = {"image": 3}, []
    monkeypatch.setattr(theirs.LlavaModel, "forward", lambda _, **given: SimpleNamespace(**{name: given[name]}))
    given = {name: SimpleNamespace(get_seq_length=lambda: 2)}
    for ids, more in ([[3, 7], [7, 7]], {"pixel_values": torch.zeros(1)}), ([[7], [7]], {}):
        model(input_ids=torch.tensor(ids), **more, **given)
        assert given[name].near["image"].tolist() == [True, False]


@pytest.mark.slow
def test_with_one_expert_that_always_weighs_one_nothing_would_learn_to_choose():
    """Why `extension_problems` refuses it: a weight over itself is 1."""
    decoder = dataclasses.replace(tiny.DECODER, top_k=1)
    plain = dataclasses.replace(tiny.PLAIN, decoder=decoder)
    config = with_extension(plain, extension("copy"))
    norms = slopes(config, tiny.arrays(config))
    assert {path for path, norm in norms.items() if norm < 1e-6} == {
        "router/new_gate", "router/calibrator/w_in", "router/calibrator/w_out"
    }  # fmt: skip
    assert norms["new_experts/w_up"] > 1e-4


def test_a_work_directory_remembers_how_it_was_grown(tmp_path: Path):
    own = settings(grow=GrowSettings(start="twin", calibrator="none"))
    assert grown_as(tmp_path, own, "image") == {"start": "twin", "calibrator": "none"}
    before = {"start": "copy", "calibrator": "two_layers"}
    for recorded, changed in ({"layers": [1]}, {}), ({"start": "added"}, {"start": "added"}), (
        {"calibrator": "vector"}, {"calibrator": "vector"}
    ):  # fmt: skip
        facts = {"extension": recorded}
        train_state.save_leaves(tmp_path / "grow" / "result", {"leaf": jnp.zeros(1)}, facts=facts)
        assert grown_as(tmp_path, own, "image") == before | changed
    with pytest.raises(MoextendError, match="extension.start: 'copy' there, 'twin' now"):
        train_state.check_facts({"extension": {"layers": [1]}}, {"extension": {"start": "twin"}}, where=tmp_path)
    train_state.check_facts({"extension": {}}, {"extension": {"start": "copy", "wide": 1}}, where=tmp_path)
