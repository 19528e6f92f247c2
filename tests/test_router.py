"""The router equals the released code, plain layers of an extended model stay plain, ties go to the pretrained."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from flax import nnx

from configs.mixtral_8x7b import get_config
from moextend_jax.checkpoints.npz import read_npz
from moextend_jax.config import DecoderConfig, ExtensionConfig, with_extension
from moextend_jax.families import FAMILIES
from moextend_jax.models.router import (
    CALIBRATORS,
    LARGEST_WEIGHT,
    Gate,
    NewColumns,
    Routing,
    Rule,
    bounded,
    over_their_sum,
    route,
    route_extended,
)
from moextend_jax.models.starts import TIE
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.settings import from_config_dict

pytestmark = pytest.mark.smoke
OPTIONS: dict[str, Any] = {"rule": Rule(2), "normalise": over_their_sum}


def new_columns(new_gate_DX, w_in_OA, w_out_AO) -> NewColumns:
    """One layer's slice, as the scan over layers hands it to the router."""
    decoder = DecoderConfig(width=new_gate_DX.shape[0], experts=w_in_OA.shape[0] - new_gate_DX.shape[1])
    extension = ExtensionConfig(
        layers=(0,), sources=(0,), new_experts=new_gate_DX.shape[1], calibrator_width=w_in_OA.shape[1]
    )
    made = nnx.eval_shape(lambda: NewColumns(decoder, extension, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    arrays = {"new_gate": new_gate_DX, "calibrator/w_in": w_in_OA, "calibrator/w_out": w_out_AO}
    whole = with_arrays(made, {path: jnp.asarray(array) for path, array in arrays.items()})
    assert isinstance(whole, NewColumns)
    return whole


@functools.cache
def layer() -> dict[str, Any]:
    kept = read_npz(oracle.SLICE)
    return {name.removeprefix("router/"): kept[name] for name in kept if name.startswith("router/")}


def routed(*, extended: bool) -> Routing:
    one = layer()
    columns = new_columns(one["new_gate_DX"], one["w_in_OA"], one["w_out_AO"])
    if not extended:
        columns = with_arrays(columns, {path: 0 * leaf[...] for path, leaf in by_path(nnx.state(columns)).items()})
    run = jax.jit(
        lambda x, gate, flag: route_extended(x, gate, [columns], extended=[flag], rule=Rule(2), normalise=bounded)
    )
    return jax.tree.map(np.asarray, run(one["x_TD"], one["gate_DE"], extended))


def test_an_extended_layer_equals_the_released_code():
    one, ours = layer(), routed(extended=True)
    np.testing.assert_allclose(ours.logits_TO, one["router_logits"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(ours.ids_Tk, one["topk_idx"])
    np.testing.assert_allclose(ours.weights_Tk, one["topk_weight"], atol=1e-5, rtol=0)
    probs_TO = np.asarray(jax.nn.softmax(ours.logits_TO, axis=-1))
    np.testing.assert_allclose(
        np.take_along_axis(probs_TO, np.asarray(ours.ids_Tk), 1), one["topk_prob"], atol=1e-5, rtol=0
    )
    assert (ours.ids_Tk == 8).any() and (ours.ids_Tk < 8).any()


def test_the_calibrator_equals_the_released_code():
    one = layer()
    columns = new_columns(one["new_gate_DX"], one["w_in_OA"], one["w_out_AO"])
    probs_TO = jax.nn.softmax(jnp.asarray(one["router_logits"]), axis=-1)
    q_TO = probs_TO + columns.calibrator.correction(probs_TO)
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(q_TO), one["topk_idx"], axis=1), one["topk_calibrated"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("name", list(CALIBRATORS))
def test_every_calibrator_by_hand(name: Any):
    """In float64, of probabilities [T, 5]."""
    rng = np.random.default_rng(0)
    q_TO = rng.dirichlet(np.ones(5), size=30)
    added = ExtensionConfig(layers=(0,), sources=(0,), calibrator=name, calibrator_width=3)
    decoder = DecoderConfig(width=6, experts=4)
    made = nnx.eval_shape(lambda: NewColumns(decoder, added, rngs=nnx.Rngs(0), dtype="float32", std=1.0)).calibrator
    leaves = {path: rng.normal(size=leaf.shape[1:]) for path, leaf in by_path(nnx.state(made, nnx.Param)).items()}
    ours = with_arrays(made, {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    by_hand = 0.0
    if name.startswith("two_layers"):
        h_TA = q_TO @ leaves["w_in"]
        by_hand = 0.5 * h_TA * (1 + np.vectorize(math.erf)(h_TA / math.sqrt(2))) @ leaves["w_out"]
    elif name != "none":
        by_hand = leaves["vector"][None]
    calibrated_TO = q_TO * by_hand if name.endswith("multiplied") else q_TO + by_hand
    single_TO = jnp.asarray(q_TO, jnp.float32)
    np.testing.assert_allclose(single_TO + ours.correction(single_TO), calibrated_TO, atol=1e-5, rtol=0)


def test_weights_are_calibrated_but_the_choice_is_not():
    """By hand in float64: a calibrator strong enough to turn the order of the two round."""
    rng = np.random.default_rng(3)
    x_TD, gate_DE, new_gate_DX = rng.normal(size=(50, 6)), rng.normal(size=(6, 4)), rng.normal(size=(6, 1))
    w_in_OA, w_out_AO = rng.normal(size=(5, 3)), 0.2 * rng.normal(size=(3, 5))
    logits_TO = np.concatenate([x_TD @ gate_DE, x_TD @ new_gate_DX], axis=1)
    p_TO = np.exp(logits_TO) / np.exp(logits_TO).sum(axis=1, keepdims=True)
    ids_Tk = np.argsort(-p_TO, axis=1, kind="stable")[:, :2]
    h_TA = p_TO @ w_in_OA
    gelu_TA = 0.5 * h_TA * (1 + np.vectorize(math.erf)(h_TA / math.sqrt(2)))
    q_TO = p_TO + gelu_TA @ w_out_AO
    chosen_Tk = np.take_along_axis(q_TO, ids_Tk, axis=1)
    single = [jnp.asarray(array, jnp.float32) for array in (x_TD, gate_DE, new_gate_DX, w_in_OA, w_out_AO)]
    ours = route_extended(single[0], single[1], [new_columns(*single[2:])], **OPTIONS)
    np.testing.assert_array_equal(ours.ids_Tk, ids_Tk)
    total_T1 = chosen_Tk.sum(axis=1, keepdims=True)
    assert np.abs(total_T1).min() > 1e-2
    np.testing.assert_allclose(ours.weights_Tk, chosen_Tk / total_T1, atol=1e-4, rtol=0)
    assert (chosen_Tk[:, 0] < chosen_Tk[:, 1]).any()


@pytest.mark.parametrize("std", [0.1, 0.3, 1.0])
def test_calibrated_weights_that_nearly_cancel_are_held_and_the_others_are_untouched(std: float):
    """Calibrators as training may leave them, on 20,000 tokens."""
    rng = np.random.default_rng(1)

    def normal(scale: float, *shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(scale=scale, size=shape), jnp.float32)

    columns = new_columns(normal(0.1, 64, 1), normal(1.0, 9, 16), normal(std, 16, 9))
    x_TD, gate_DE = normal(1.0, 20_000, 64), normal(0.1, 64, 8)

    def weights(normalise) -> np.ndarray:
        routing = route_extended(x_TD, gate_DE, [columns], rule=Rule(2), normalise=normalise)
        return np.asarray(routing.weights_Tk)

    free_Tk, held_Tk = weights(over_their_sum), weights(bounded)
    wild_T = np.abs(free_Tk).sum(axis=1) > LARGEST_WEIGHT * (1 + 1e-5)
    assert wild_T.any() and np.abs(free_Tk).max() > 50
    assert np.abs(held_Tk).max() <= LARGEST_WEIGHT
    sane_T = np.abs(free_Tk).sum(axis=1) < LARGEST_WEIGHT * (1 - 1e-5)
    assert sane_T.mean() > 0.75 and held_Tk[sane_T].tobytes() == free_Tk[sane_T].tobytes()
    ratios_T = held_Tk[wild_T, 0] * free_Tk[wild_T, 1] - held_Tk[wild_T, 1] * free_Tk[wild_T, 0]
    assert np.abs(ratios_T / free_Tk[wild_T].max(axis=1)).max() < 1e-4  # what the calibrator says of the two stays


def test_the_guard_has_a_finite_gradient_where_weights_cancel():
    weights_Tk = jnp.array([[0.4, -0.4], [0.4, -0.39999998], [0.0, 0.0], [0.6, 0.2]])
    held_Tk, pull = jax.vjp(bounded, weights_Tk)
    (gradient_Tk,) = pull(jnp.array([[1.0, 2.0]] * 4))
    assert np.isfinite(held_Tk).all() and np.isfinite(gradient_Tk).all()
    assert np.abs(gradient_Tk[:2]).max() < 20
    np.testing.assert_allclose(held_Tk[0], [2, -2])
    np.testing.assert_allclose(held_Tk[3], [0.75, 0.25])


def test_the_recipe_says_whether_weights_are_guarded():
    paper, released = (from_config_dict(get_config(name)).model_options for name in ("paper", "released"))
    assert (paper["weight_guard"], released["weight_guard"]) == ("bounded", "none")


def test_a_plain_layer_of_an_extended_model_routes_like_the_plain_model():
    one, ours = layer(), routed(extended=False)
    plain = jax.jit(functools.partial(route, rule=Rule(2)))(one["x_TD"], one["gate_DE"])
    np.testing.assert_array_equal(ours.logits_TO[:, :8], plain.logits_TO)
    assert np.isneginf(ours.logits_TO[:, 8:]).all()
    np.testing.assert_array_equal(ours.ids_Tk, plain.ids_Tk)
    np.testing.assert_allclose(ours.weights_Tk, plain.weights_Tk, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_a_plain_layer_gives_new_leaves_a_zero_gradient_and_no_nan():
    one = layer()

    def total(columns: NewColumns, gate_DE: jax.Array):
        routing = route_extended(one["x_TD"], gate_DE, [columns], extended=[jnp.array(False)], **OPTIONS)
        return (routing.weights_Tk * jnp.arange(2.0)[None]).sum()

    zeros = new_columns(*(np.zeros_like(one[name]) for name in ("new_gate_DX", "w_in_OA", "w_out_AO")))
    columns, gate_DE = jax.grad(total, argnums=(0, 1))(zeros, jnp.asarray(one["gate_DE"]))
    for path, leaf in by_path(nnx.state(columns)).items():
        assert np.isfinite(leaf[...]).all(), path
        assert not np.any(leaf[...]), path
    assert np.isfinite(gate_DE).all() and np.abs(gate_DE).max() > 1e-3


def test_weights_sum_to_one_and_the_likeliest_comes_first():
    one = layer()
    plain = route(one["x_TD"], one["gate_DE"], rule=Rule(3))
    np.testing.assert_allclose(plain.weights_Tk.sum(axis=1), 1, atol=1e-6)
    assert (np.diff(np.asarray(plain.weights_Tk), axis=1) <= 0).all()
    np.testing.assert_array_equal(plain.ids_Tk, np.argsort(-plain.logits_TO, axis=1)[:, :3])
    np.testing.assert_allclose(routed(extended=True).weights_Tk.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("width", tiny.few([6, 1000]))
def test_of_a_clone_and_its_source_the_source_comes_first(width: int):
    """Where their logits are equal to the last bit, as those of short sums are. Two products may round a longer one in
    two ways, by their widths, the processor and the version of XLA; that much is `TIE`, and twins count with it."""
    rng = np.random.default_rng(0)
    x_TD, gate_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, width), (width, 4)))
    columns = new_columns(gate_DE[:, 2:3], np.zeros((5, 3), np.float32), np.zeros((3, 5), np.float32))
    logits_TO, ids_Tk = map(np.asarray, route_extended(x_TD, gate_DE, [columns], **OPTIONS)[:2])
    np.testing.assert_allclose(logits_TO[:, 4], logits_TO[:, 2], atol=TIE, rtol=0)
    equal_T = logits_TO[:, 4] == logits_TO[:, 2]
    both_T = (ids_Tk == 2).any(axis=1) & (ids_Tk == 4).any(axis=1) & equal_T
    assert both_T.any() or width > 6
    assert (ids_Tk[both_T] == [2, 4]).all()
    assert ((ids_Tk == 2).any(axis=1) | ~(ids_Tk == 4).any(axis=1) | ~equal_T).all()


def test_without_renormalising_a_new_column_takes_nothing_from_tokens_that_do_not_choose_it():
    """Probabilities among more columns are smaller; what the chosen weigh together is what it was."""
    rng = np.random.default_rng(0)
    x_TD, gate_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((60, 6), (6, 8)))
    columns = new_columns(gate_DE[:, 2:3], np.zeros((9, 3), np.float32), np.zeros((3, 9), np.float32))
    base = route(x_TD, gate_DE, rule=Rule(3, normalised=False))
    ours = route_extended(x_TD, gate_DE, [columns], rule=Rule(3, normalised=False), normalise=over_their_sum)
    np.testing.assert_allclose(ours.weights_Tk.sum(axis=1), base.weights_Tk.sum(axis=1), rtol=1e-6)
    assert np.ptp(base.weights_Tk.sum(axis=1)) > 0.1
    without_T = ~(np.asarray(base.ids_Tk) == 2).any(axis=1)
    assert 10 < without_T.sum() < 50
    np.testing.assert_array_equal(ours.ids_Tk[without_T], base.ids_Tk[without_T])
    np.testing.assert_allclose(ours.weights_Tk[without_T], base.weights_Tk[without_T], rtol=1e-6)


def test_literally_it_takes_its_probability_from_every_weight():
    """`Recipe.mass`: a softmax over E+X whose chosen are not renormalised, by hand in float64."""
    rng = np.random.default_rng(0)
    x_TD, gate_DE = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((60, 6), (6, 8)))
    w_out_AO = rng.normal(size=(3, 9), scale=0.1)
    calibrators = {"at the start": np.zeros((3, 9)), "trained": w_out_AO}
    base = route(x_TD, gate_DE, rule=Rule(3, normalised=False))
    p_TO = np.exp(np.asarray(base.logits_TO, float))
    p_TO = np.concatenate([p_TO, p_TO[:, 2:3]], axis=1) / (p_TO.sum(axis=1) + p_TO[:, 2])[:, None]
    for w_out_AO in calibrators.values():
        columns = new_columns(gate_DE[:, 2:3], np.ones((9, 3), np.float32), w_out_AO.astype(np.float32))
        ours = route_extended(
            x_TD, gate_DE, [columns], rule=Rule(3, normalised=False), normalise=bounded, mass="literal"
        )
        h_TA = p_TO @ np.ones((9, 3))
        q_TO = p_TO + (0.5 * h_TA * (1 + np.vectorize(math.erf)(h_TA / math.sqrt(2)))) @ w_out_AO
        np.testing.assert_allclose(ours.weights_Tk, np.take_along_axis(q_TO, np.asarray(ours.ids_Tk), 1), atol=1e-6)
        if not w_out_AO.any():
            without_T = ~(np.asarray(base.ids_Tk) == 2).any(axis=1)
            less_T1 = 1 - p_TO[without_T, 8:]
            np.testing.assert_allclose(ours.weights_Tk[without_T], base.weights_Tk[without_T] * less_T1, rtol=1e-5)
            assert less_T1.min() < 0.96  # for tokens that never choose the column or its source
    normalised = [
        route_extended(x_TD, gate_DE, [columns], rule=Rule(3), normalise=bounded, mass=mass).weights_Tk
        for mass in ("base", "literal")
    ]
    np.testing.assert_array_equal(
        normalised[0], normalised[1]
    )  # where the base's weights sum to one there is nothing to set


def test_the_recipe_says_what_weights_sum_to():
    literal = from_config_dict({**get_config("paper").to_dict(), "recipe": {"mass": "literal"}}).model_options
    assert (literal["mass"], from_config_dict(get_config("paper")).model_options["mass"]) == ("literal", "base")


def test_router_logits_are_float32_in_a_bfloat16_model():
    one = layer()
    routing = route(jnp.asarray(one["x_TD"], jnp.bfloat16), jnp.asarray(one["gate_DE"]), rule=Rule(2))
    assert routing.logits_TO.dtype == routing.weights_Tk.dtype == jnp.float32


# --- in the whole model -----------------------------------------------------------------------------------------------


def whole(config, arrays):
    model = tiny.structure(config)

    @jax.jit
    def run(arrays, batch):
        made = with_arrays(model, arrays)
        decoded = made(batch)
        return made.decoder.logits(decoded.hidden_BLD), decoded.routing

    return jax.tree.map(np.asarray, run(arrays, tiny.batch()))


def test_new_columns_that_nobody_can_choose_leave_the_model_as_it_was():
    """All hidden states share a large first coordinate, which the new columns dislike."""
    arrays = tiny.arrays(tiny.EXTENDED, std=0.2)
    arrays["decoder/embed"] = arrays["decoder/embed"].at[:, 0].set(20.0)
    arrays["media/image/projector/second_bias"] = arrays["media/image/projector/second_bias"].at[0].set(20.0)
    arrays["media/image/projector/second"] = arrays["media/image/projector/second"].at[:, 0].set(0.0)
    arrays["extensions/image/router/new_gate"] = (
        jnp.zeros_like(arrays["extensions/image/router/new_gate"]).at[:, 0].set(-1e4)
    )
    arrays["extensions/image/router/calibrator/w_out"] *= 0
    plain = {path: leaf for path, leaf in arrays.items() if not path.startswith("extensions/image/")}
    (logits_BLV, routing), (plain_BLV, plain_routing) = whole(tiny.EXTENDED, arrays), whole(tiny.PLAIN, plain)
    experts = tiny.DECODER.experts
    assert (routing.logits_TO[list(tiny.EXTENSION.layers)][..., experts] < -1e3).all()
    np.testing.assert_array_equal(routing.ids_Tk, plain_routing.ids_Tk)
    np.testing.assert_array_equal(logits_BLV, plain_BLV)
    assert len(np.unique(routing.ids_Tk)) == experts


def test_plain_layers_of_an_extended_model_never_choose_new_experts():
    config = with_extension(tiny.PLAIN, dataclasses.replace(tiny.EXTENSION, layers=(1,), sources=(0,)))
    _, routing = whole(config, tiny.arrays(config))
    new = tiny.DECODER.experts
    assert np.isneginf(routing.logits_TO[[0, 2], :, new:]).all()
    assert np.isfinite(routing.logits_TO[1]).all()
    assert (routing.ids_Tk[[0, 2]] < new).all() and (routing.ids_Tk[1] == new).any()
    np.testing.assert_allclose(routing.weights_Tk[[0, 2]].sum(axis=-1), 1, atol=1e-5)


GLM = Rule(3, scores="sigmoid", routed_factor=2.5)


def sigmoid_router(*, seed: int = 0, groups: int = 1) -> dict[str, Any]:
    """By hand in float64: scores, what chooses, choice and weights of 60 tokens among 8 experts."""
    rng = np.random.default_rng(seed)
    x_TD, gate_DE, bias_E = rng.normal(size=(60, 6)), rng.normal(size=(6, 8)), 0.2 * rng.normal(size=8)
    scores_TE = 1 / (1 + np.exp(-x_TD @ gate_DE))
    chosen_by_TE = scores_TE + bias_E
    if groups > 1:
        worth_Tg = np.sort(chosen_by_TE.reshape(60, groups, -1), axis=-1)[..., -2:].sum(axis=-1)
        out_Tg = worth_Tg < np.sort(worth_Tg, axis=-1)[:, -2:-1]
        chosen_by_TE = np.where(np.repeat(out_Tg, 8 // groups, axis=1), -np.inf, chosen_by_TE)
    ids_Tk = np.argsort(-chosen_by_TE, axis=1)[:, :3]
    chosen_Tk = np.take_along_axis(scores_TE, ids_Tk, axis=1)
    weights_Tk = 2.5 * chosen_Tk / chosen_Tk.sum(axis=1, keepdims=True)
    arrays = {"x": x_TD, "gate": gate_DE, "bias": bias_E}
    given = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    return given | {"ids": ids_Tk, "weights": weights_Tk, "chosen_by": chosen_by_TE}


@pytest.mark.parametrize("groups", [1, 4])
def test_a_bias_chooses_and_does_not_weigh(groups: int):
    one = sigmoid_router(groups=groups)
    rule = GLM._replace(groups=groups, top_groups=2 if groups > 1 else 1)
    ours = route(one["x"], Gate(one["gate"], None, one["bias"]), rule=rule)
    np.testing.assert_array_equal(ours.ids_Tk, one["ids"])
    np.testing.assert_allclose(ours.weights_Tk, one["weights"], atol=1e-6)
    np.testing.assert_allclose(ours.chosen_by_TO, one["chosen_by"], atol=1e-6)
    assert (np.asarray(ours.ids_Tk) != np.argsort(-np.asarray(ours.logits_TO), axis=1)[:, :3]).any()


def columns_of(one: dict[str, Any], *, source: int, bias: float) -> Any:
    config = DecoderConfig(width=6, experts=8, selection_bias=True)
    extension = ExtensionConfig(layers=(0,), sources=(source,), calibrator_width=3)
    columns = NewColumns(config, extension, rngs=nnx.Rngs(0), dtype="float32", std=1.0)
    w_in_OA, w_out_AO = np.ones((9, 3), np.float32), np.zeros((3, 9), np.float32)
    leaves = {
        "new_gate": one["gate"][:, source : source + 1], "new_bias": jnp.array([bias], jnp.float32),
        "calibrator/w_in": jnp.asarray(w_in_OA), "calibrator/w_out": jnp.asarray(w_out_AO),
    }  # fmt: skip
    return with_arrays(columns, leaves)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_new_expert_with_its_sources_bias_changes_those_tokens_alone_that_chose_the_source(groups: int):
    """It stands outside the groups, so that it does not decide which of them are the best."""
    one = sigmoid_router(groups=groups)
    rule = GLM._replace(groups=groups, top_groups=2 if groups > 1 else 1)
    base = route(one["x"], Gate(one["gate"], None, one["bias"]), rule=rule)
    source = int(np.bincount(np.asarray(base.ids_Tk).reshape(-1)).argmax())
    columns = columns_of(one, source=source, bias=float(one["bias"][source]))
    ours = route_extended(
        one["x"], Gate(one["gate"], None, one["bias"]), [columns], rule=rule, normalise=over_their_sum
    )
    chose_T = (np.asarray(base.ids_Tk) == source).any(axis=1)
    assert 5 < chose_T.sum() < 60
    early_T = (np.asarray(base.ids_Tk)[:, :2] == source).any(axis=1)  # on the last place the source is alone
    assert (np.asarray(ours.ids_Tk) == 8).any(axis=1)[early_T].all() and early_T.any()
    np.testing.assert_allclose(np.asarray(ours.weights_Tk).sum(axis=1), 2.5, rtol=1e-5)
    if groups == 1:  # in groups the copy may be let in where the source was not
        np.testing.assert_array_equal(ours.ids_Tk[~chose_T], base.ids_Tk[~chose_T])
        np.testing.assert_allclose(ours.weights_Tk[~chose_T], base.weights_Tk[~chose_T], rtol=1e-6)


@pytest.mark.parametrize("new", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_change_those_tokens_alone_that_chose_a_source(family: str, new: int):
    """By every family's rule, at the numbers of experts of a published model."""
    own = FAMILIES[family]
    config = DecoderConfig(**{**own.fields, **next(iter(own.published.values())), "width": 6})
    rng, E, rule = np.random.default_rng(0), config.experts, Rule.of(config)
    drawn = {"x": (300, 6), "gate": (6, E), "bias": (E,), "selection": (E,)}
    given = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in drawn.items()}
    chooses_E = given["selection"] / E if config.selection_bias else None  # enough to make other choices
    gate = Gate(given["gate"], given["bias"] if config.router_bias else None, chooses_E)
    base = route(given["x"], gate, rule=rule)
    sources = np.bincount(np.asarray(base.ids_Tk).reshape(-1), minlength=E).argsort()[::-1][:new]
    extension = ExtensionConfig(layers=(0,), sources=tuple(map(int, sources)), new_experts=new, calibrator_width=3)
    made = NewColumns(config, extension, rngs=nnx.Rngs(0), dtype="float32", std=1.0)
    leaves = {path: leaf[0] for path, leaf in by_path(nnx.state(made)).items()}
    leaves |= {"new_gate": given["gate"][:, sources], "calibrator/w_out": jnp.zeros((3, E + new))}
    for name, bias_E in (("new_gate_bias", gate.bias_E), ("new_bias", chooses_E)):
        leaves |= {} if bias_E is None else {name: bias_E[sources]}
    ours = route_extended(given["x"], gate, [with_arrays(made, leaves)], rule=rule, normalise=over_their_sum)
    without_T = ~np.isin(base.ids_Tk, sources).any(axis=1)
    assert 20 < without_T.sum() < 290 and (np.asarray(ours.ids_Tk) >= E).any()
    np.testing.assert_array_equal(ours.ids_Tk[without_T], base.ids_Tk[without_T])
    np.testing.assert_allclose(ours.weights_Tk[without_T], base.weights_Tk[without_T], rtol=1e-5)
    if chooses_E is not None:
        plain = route(given["x"], gate._replace(selection_E=None), rule=rule)
        assert (np.asarray(plain.ids_Tk) != np.asarray(base.ids_Tk)).any()


def test_a_new_expert_whose_bias_is_minus_infinity_is_not_there():
    one = sigmoid_router()
    base = route(one["x"], Gate(one["gate"], None, one["bias"]), rule=GLM)
    columns = columns_of(one, source=1, bias=-np.inf)
    ours = route_extended(one["x"], Gate(one["gate"], None, one["bias"]), [columns], rule=GLM, normalise=over_their_sum)
    np.testing.assert_array_equal(ours.ids_Tk, base.ids_Tk)
    np.testing.assert_allclose(ours.weights_Tk, base.weights_Tk, rtol=1e-6)
