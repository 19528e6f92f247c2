"""Sorted and grouped experts equal a loop over tokens, with gradients; copy-init changes what the method says."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny import few

from moextend_jax.config import RECIPES
from moextend_jax.models import blocked_swiglu, experts
from moextend_jax.models.adapters import Factors, Update
from moextend_jax.models.decoder import Extension, MoE
from moextend_jax.models.expert_parallel import mixture
from moextend_jax.models.experts import Experts, apply_experts, combine, dispatch, rows_of, sort_by_expert
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.router import Routing
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.train import stages
from moextend_jax.train.loss import losses

T, D, F, E, X = 30, 6, 10, 4, 1


@functools.cache
def parts() -> list[Experts]:
    rng = np.random.default_rng(0)

    def made(groups: int) -> Experts:
        sizes = {"Z": 1, "E": groups, "D": D, "F": F}
        experts = nnx.eval_shape(lambda: Experts("ZEDF", sizes, rngs=nnx.Rngs(0), dtype="float32"))
        arrays = {
            path: jnp.asarray(rng.normal(size=param.shape[1:]), jnp.float32)
            for path, param in by_path(nnx.state(experts)).items()
        }
        one = with_arrays(experts, arrays)
        assert isinstance(one, Experts)
        return one

    return [made(E), made(X)]


@functools.cache
def routing() -> Routing:
    rng = np.random.default_rng(1)
    logits_TO = rng.normal(size=(T, E + X)).astype(np.float32)
    logits_TO[:, 2] = -9.0  # nobody chooses expert 2
    ids_Tk = np.argsort(-logits_TO, axis=1)[:, :2].astype(np.int32)
    weights_Tk = rng.normal(size=(T, 2)).astype(np.float32)
    return Routing(jnp.asarray(logits_TO), jnp.asarray(ids_Tk), jnp.asarray(weights_Tk))


X_TD = jnp.asarray(np.random.default_rng(2).normal(size=(T, D)), jnp.float32)


def reference(x_TD, weights_Tk, parts):
    """Every expert on every token."""
    w_gate, w_up, w_down = (
        jnp.concatenate([getattr(part, name)[...] for part in parts]) for name in ("w_gate", "w_up", "w_down")
    )
    hidden_TOF = jax.nn.silu(jnp.einsum("TD,ODF->TOF", x_TD, w_gate)) * jnp.einsum("TD,ODF->TOF", x_TD, w_up)
    y_TOD = jnp.einsum("TOF,OFD->TOD", hidden_TOF, w_down)
    y_TkD = jnp.take_along_axis(y_TOD, routing().ids_Tk[..., None], axis=1)
    return (weights_Tk[..., None] * y_TkD).sum(axis=1)


def test_equals_every_expert_on_every_token_with_all_gradients():
    dy_TD = jnp.cos(jnp.arange(T * D, dtype=jnp.float32)).reshape(T, D)

    def ours(x_TD, weights_Tk, parts):
        return apply_experts(x_TD, routing().ids_Tk, weights_Tk, [part.weights(x_TD.dtype) for part in parts])

    results = []
    for function in (ours, reference):
        y_TD, pull = jax.vjp(function, X_TD, routing().weights_Tk, parts())
        results.append(jax.tree.leaves((y_TD, jax.tree.map(lambda leaf: leaf, pull(dy_TD)))))
    assert len(results[0]) == len(results[1]) == 1 + 2 + 6
    for mine, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4, rtol=0)


def test_sorting_brings_each_expert_its_rows_and_back():
    ids_Tk = routing().ids_Tk
    sorting = sort_by_expert(ids_Tk, experts=E + X)
    ids_R = np.asarray(ids_Tk).reshape(-1)
    np.testing.assert_array_equal(ids_R[sorting.order_R], np.repeat(np.arange(E + X), sorting.sizes_O))
    np.testing.assert_array_equal(np.asarray(sorting.order_R)[sorting.inverse_R], np.arange(2 * T))
    assert sorting.sizes_O[2] == 0 and sorting.sizes_O.sum() == 2 * T


def test_the_backward_passes_written_by_hand_are_the_true_ones():
    sorting = sort_by_expert(routing().ids_Tk, experts=E + X)
    y_RD = jnp.asarray(np.random.default_rng(5).normal(size=(2 * T, D)), jnp.float32)

    def plain_combine(y_RD):
        return jnp.zeros((T, D)).at[sorting.order_R // 2].add(y_RD)

    for ours, plain, given in (
        (lambda x: dispatch(2, x, sorting), lambda x: x[sorting.order_R // 2], X_TD),
        (lambda y: combine(2, y, sorting), plain_combine, y_RD),
    ):
        out, pull = jax.vjp(ours, given)
        plain_out, plain_pull = jax.vjp(plain, given)
        np.testing.assert_allclose(out, plain_out, atol=1e-5, rtol=0)
        np.testing.assert_allclose(pull(jnp.sin(out))[0], plain_pull(jnp.sin(out))[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", (1, 8, 24, 84))
def test_many_small_experts_compute_few_rows(tokens: int):
    ids_Tk = jax.vmap(lambda key: jax.random.permutation(key, 128)[:8])(jax.random.split(jax.random.key(0), tokens))
    sizes_O = sort_by_expert(ids_Tk, experts=128).sizes_O
    rows = blocked_swiglu._Rows(sizes_O, tokens * 8, jnp.float32)
    computed = rows.for_each_block(lambda done, block, *_: done + block.rows, 0, ((sizes_O[:, None],),), None)
    assert computed <= 4 * tokens * 8


def test_gradients_of_weights_are_added_up_in_float32():
    """Of 32 blocks of an expert's rows, in bfloat16: a sum in bfloat16 is wrong by more than one percent."""
    rng, R = np.random.default_rng(0), 8192
    x_RD = jnp.asarray(1 + 0.1 * rng.normal(size=(R, 4)), jnp.bfloat16)
    weights = [rng.normal(size=(1, 4, 4)).astype(jnp.bfloat16) for _ in range(3)]

    def gradients(dtype: Any) -> list[np.ndarray]:
        def total(weights: Any) -> jax.Array:
            ones_R1, sizes_O = jnp.ones((R, 1), dtype), jnp.array([R], jnp.int32)
            y_RD: Any = blocked_swiglu.blocked_swiglu(x_RD.astype(dtype), ones_R1, (tuple(weights),), sizes_O)
            return jnp.sum(y_RD, dtype=jnp.float32)

        found = jax.jit(jax.grad(total))([jnp.asarray(weight, dtype) for weight in weights])
        return [np.asarray(leaf, np.float32) for leaf in found]

    for mine, exact in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert np.abs(mine - exact).max() < 0.005 * np.abs(exact).max()


def test_a_token_does_not_depend_on_the_other_tokens():
    ids_Tk, weights_Tk, weights = routing().ids_Tk, routing().weights_Tk, [part.weights("float32") for part in parts()]
    few, all_ = (apply_experts(X_TD[:n], ids_Tk[:n], weights_Tk[:n], weights) for n in (7, T))
    np.testing.assert_allclose(few, all_[:7], atol=1e-5, rtol=0)


def test_a_pick_of_nobodys_expert_adds_nothing():
    weights = [part.weights("float32") for part in parts()]
    elsewhere_Tk = routing().ids_Tk.at[:, 1].set(E + X)
    y_TD = apply_experts(X_TD, elsewhere_Tk, routing().weights_Tk, weights)
    first_alone_TD = reference(X_TD, routing().weights_Tk.at[:, 1].set(0.0), parts())
    np.testing.assert_allclose(y_TD, first_alone_TD, atol=1e-4, rtol=0)


@pytest.mark.parametrize("platform", few(["cpu", "gpu"]))
def test_nor_does_a_low_rank_update_that_all_experts_share(platform: str, monkeypatch: pytest.MonkeyPatch):
    """Of a token without an expert here: another device has it, or another part of the model."""
    monkeypatch.setattr(experts, "platform", lambda: platform)
    rng, (T, D, F, E, R) = np.random.default_rng(0), (4, 6, 8, 2, 3)

    def drawn(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    weights, x_TD = (drawn(E, D, F), drawn(E, D, F), drawn(E, F, D)), drawn(T, D)
    shared = Factors(drawn(D, R), drawn(R, F), drawn(D, R), drawn(R, F), drawn(F, R), drawn(R, D))
    ids_Tk, halves_Tk = jnp.array([[0, 2], [1, 0], [2, 2], [1, 2]]), jnp.full((T, 2), 0.5)  # 2 is nobody

    def out(factors: Factors) -> jax.Array:
        update = Update(factors, jnp.ones((T, 1)))
        return experts.apply_experts(x_TD, ids_Tk, halves_Tk, [weights], update=update)

    y_TD, gradient = out(shared), jax.grad(lambda factors: out(factors)[2].sum())(shared)
    assert not np.any(y_TD[2]) and np.all(np.any(y_TD[jnp.array([0, 1, 3])], axis=1))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_copy_init_changes_only_tokens_whose_first_choice_was_copied():
    """method.md, known properties: expert and clone then take both slots; elsewhere the output is unchanged."""
    source, rng = 1, np.random.default_rng(0)
    arrays = {path.removeprefix("decoder/layers/moe/"): leaf[0] for path, leaf in tiny.arrays(tiny.PLAIN).items()
              if path.startswith("decoder/layers/moe/")}  # fmt: skip
    sizes = tiny.DECODER.sizes()
    moe = with_arrays(nnx.eval_shape(lambda: MoE(tiny.DECODER, rngs=nnx.Rngs(0), dtype="float32")), arrays)
    experts = {name: arrays[f"experts/{name}"][source][None] for name in ("w_gate", "w_up", "w_down")}
    clone = {f"new_experts/{name}": leaf for name, leaf in experts.items()} | {
        "router/new_gate": arrays["gate"][:, source][:, None],
        "router/calibrator/w_in": jnp.ones((sizes["E"] + 1, 5)),
        "router/calibrator/w_out": jnp.zeros((5, sizes["E"] + 1)),
    }
    fresh = nnx.eval_shape(lambda: Extension(tiny.DECODER, tiny.EXTENSION, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    new = with_arrays(fresh, clone)
    assert isinstance(moe, MoE) and isinstance(new, Extension)
    x_BLD = jnp.asarray(rng.normal(size=(1, 200, sizes["D"])), jnp.float32)

    @functools.partial(jax.jit, static_argnames="grown")
    def run(x_BLD, grown: bool):
        return mixture(x_BLD, moe, [new] if grown else [], extended=[jnp.array(True)] * grown, config=tiny.EXTENDED)

    (before_BLD, before), (after_BLD, _) = run(x_BLD, grown=False), run(x_BLD, grown=True)
    first_T = np.asarray(before.ids_Tk)[:, 0] == source
    second_T = np.asarray(before.ids_Tk)[:, 1] == source
    moved_T = np.abs(np.asarray(after_BLD - before_BLD))[0].max(axis=1)
    assert first_T.any() and second_T.any() and not (first_T | second_T).all()
    assert moved_T[~first_T].max() < 1e-5
    assert moved_T[first_T].min() > 1e-3


# --- what the compiled gradient computes ------------------------------------------------------------------------------


@functools.cache
def program(stage: str) -> str:
    """The optimized program of a stage's gradient; experts are the only arrays with sides 24 and 40."""
    arrays = tiny.arrays(tiny.EXTENDED)
    trainable, frozen = stages.split(arrays, tiny.STAGES[stage])
    model = tiny.structure(tiny.EXTENDED)

    def total(trainable, frozen, batch):
        whole = with_arrays(model, {**trainable, **frozen})
        return losses(whole, batch, recipe=RECIPES["paper"], aux_coefficient=0.01, chunk=4)[0].total

    lowered = jax.jit(jax.grad(total)).lower(trainable, frozen, tiny.batch())
    text = lowered.compile().as_text()
    assert text is not None
    return text


def weight_gradients(program: str) -> int:
    """Products whose result has the shape of one expert's matrix."""
    return len(re.findall(r"= f32\[(?:24,40|40,24)\]\S* (?:dot|custom-call)\(", program))


@pytest.mark.parametrize(
    ("stage", "products"),
    [
        ("extend", 0),
        ("finetune", 3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("align", 0), ("full", 3))),
    ],
)
def test_no_weight_gradient_of_a_frozen_expert_is_computed(stage: str, products: int, cpu_program: None):
    assert weight_gradients(program(stage)) == products


@pytest.mark.parametrize("stage", ["extend", "finetune"])
def test_nor_of_frozen_attention_embedding_or_head(stage: str, cpu_program: None):
    results = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|custom-call|scatter)\(", program(stage))
    assert results
    heads, kv, size, width = 4, 2, 6, tiny.DECODER.width
    weights = {
        (width, heads, size), (width, kv, size), (heads, size, width), (width, heads * size), (width, kv * size),
        (heads * size, width), (tiny.DECODER.vocab_size, width), (width, tiny.DECODER.vocab_size),
    } - {(width, width)}  # fmt: skip
    assert not weights & {tuple(map(int, shape.split(","))) for shape in results}


@pytest.mark.slow
@pytest.mark.parametrize("how", few(["gather", "exchange"]))
def test_tokens_that_are_not_real_cost_no_expert_and_change_nobody(how: Any, monkeypatch: pytest.MonkeyPatch):
    model = tiny.structure(tiny.EXTENDED)
    whole = with_arrays(model, tiny.arrays(tiny.EXTENDED))
    assert isinstance(whole, MoExtend)
    layer = tiny.EXTENSION.layers[0]
    moe, new = (
        nnx.merge(*nnx.split(jax.tree.map(lambda leaf, n=n: leaf[n], module)))
        for module, n in ((whole.decoder.layers.moe, layer), (whole.extensions["image"], 0))
    )
    x_BLD = jax.random.normal(jax.random.key(3), (2, 9, tiny.DECODER.width))
    real_BL = jnp.arange(9)[None, :] < jnp.array([[9], [4]])
    rows = []
    inner = experts.swiglu
    monkeypatch.setattr(experts, "swiglu", lambda *args: rows.append(int(args[3].sum())) or inner(*args))
    config = dataclasses.replace(tiny.EXTENDED, dispatch=how)
    run = functools.partial(mixture, x_BLD, moe, [new], extended=[jnp.array(True)], config=config)
    (all_BLD, all_routed), (some_BLD, routed) = run(), run(real_BL=real_BL)
    assert sum(rows[: len(rows) // 2]) == 2 * 18 and sum(rows[len(rows) // 2 :]) == 2 * 13
    np.testing.assert_array_equal(some_BLD, jnp.where(real_BL[..., None], all_BLD, 0))
    for one, other in zip(all_routed, routed, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bias_by_row_has_the_gradient_of_a_gather():
    expert_R = jnp.asarray([0, 0, 2, 2, 2, 3])
    b_OF, dy_RF = (jax.random.normal(jax.random.key(n), (rows, 5)) for n, rows in enumerate((4, 6)))
    y_RF, pull = jax.vjp(lambda b_OF: rows_of(b_OF, expert_R), b_OF)
    expected, pull_there = jax.vjp(lambda b_OF: b_OF[expert_R], b_OF)
    np.testing.assert_array_equal(y_RF, expected)
    np.testing.assert_allclose(pull(dy_RF)[0], pull_there(dy_RF)[0], rtol=0, atol=1e-6)
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(lambda b: rows_of(b, expert_R).sum()))(b_OF))
