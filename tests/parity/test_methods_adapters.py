"""Low-rank updates: our router, experts and losses on the arrays of lora_experts, mole and moram.npz (`methods.py`)."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import few

from moextend_jax.config import (
    AdaptedExperts,
    AdapterConfig,
    Batch,
    DecoderConfig,
    FeaturesConfig,
    Gating,
    ImageTags,
    Medium,
    ModelConfig,
    Named,
)
from moextend_jax.models import experts
from moextend_jax.models.adapters import Adapted, BlockAdapter, low_rank, router_update, self_activated, update_of
from moextend_jax.models.experts import apply_experts
from moextend_jax.models.moextend import shares
from moextend_jax.models.router import Gate, Rule, route
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import BALANCE
from parity.methods import methods_arrays

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
MAPS = ("gate", "up", "down")
Leaves = dict[str, jax.Array]


@pytest.fixture(params=["cpu", "tpu"])
def platform(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The loops of the CPU with their own backward pass, or products as TPU and GPU have them, through `ragged_dot`."""
    monkeypatch.setattr(experts, "platform", lambda: request.param)
    return request.param


def output(
    theirs: dict[str, np.ndarray], config: AdapterConfig, x_TD: jax.Array, leaves: Leaves, *, k: int, ffn: bool = False
):
    """y_TD and the routing of one block whose adapter has these leaves."""
    base = [jnp.asarray(theirs[f"w_{name}"])[: 1 if ffn else None] for name in ("gate_EDF", "up_EDF", "down_EFD")]
    E, D, F = base[0].shape
    decoder = DecoderConfig(width=D, hidden=F, experts=E, layers=1)
    made = nnx.eval_shape(lambda: BlockAdapter(decoder, config, rngs=nnx.Rngs(0), dtype="float32"))
    block = cast(BlockAdapter, with_arrays(made, leaves))
    blocks = [(config, block, jnp.full((len(x_TD), 1), config.scale))]
    gate = Gate(jnp.asarray(theirs["gate_DE"])[:, :E], update_TE=router_update(blocks, x_TD))
    routing = route(x_TD, gate, rule=Rule(k))
    update, _ = update_of(blocks, x_TD)
    parts = [(base[0], base[1], base[2])]
    return apply_experts(x_TD, routing.ids_Tk, routing.weights_Tk, parts, update=update), routing


def check(theirs: dict[str, np.ndarray], variant: str, of, x_TD: jax.Array, leaves: Leaves, named: dict[str, Any]):
    """`of(x_TD, leaves)` and its gradients against the arrays of a variant. named: by leaf what theirs is called, and
    what makes ours theirs."""
    cotangent_TD = jnp.asarray(theirs["cotangent_TD"])
    y_TD, pull = jax.vjp(lambda x_TD, leaves: of(x_TD, leaves)[0], x_TD, leaves)
    dx_TD, d_leaves = pull(cotangent_TD)
    np.testing.assert_allclose(y_TD, theirs[f"{variant}/y_TD"], **CLOSE)
    np.testing.assert_allclose(dx_TD, theirs[f"{variant}/d_x_TD"], **CLOSE)
    for path, (name, to_theirs) in named.items():
        np.testing.assert_allclose(to_theirs(d_leaves[path]), theirs[f"{variant}/d_{name}"], err_msg=path, **CLOSE)


@pytest.mark.smoke
@pytest.mark.parametrize("variant", ["per_expert", "per_expert_and_router", "shared"])
def test_lora_on_experts_and_router(variant: str, platform: str):
    theirs, shared = methods_arrays("lora_experts"), variant == "shared"
    stack, prefix = ("", "shared_") if shared else ("E", "")
    axes = {"gate": ("Dr", "rF"), "up": ("Dr", "rF"), "down": ("Fr", "rD")}
    named = {
        f"{name}/{factor}": f"{factor}_{name}_{stack}{axes[name][n]}" for name in MAPS for n, factor in enumerate("ab")
    }
    if variant.endswith("router"):
        named |= {"router/a": "a_router_Dr", "router/b": "b_router_rE"}
    leaves = {
        path: jnp.asarray(theirs[prefix * (not path.startswith("router")) + name]) for path, name in named.items()
    }
    of_experts: AdaptedExperts = "shared" if shared else "per_expert"
    rank = leaves["gate/a"].shape[-1]
    config = AdapterConfig(
        rank=rank, alpha=float(theirs["alpha"]), experts=of_experts, router=variant.endswith("router")
    )
    k = theirs[f"{variant}/ids_Tk"].shape[1]
    x_TD, of = jnp.asarray(theirs["x_TD"]), functools.partial(output, theirs, config, k=k)
    check(theirs, variant, of, x_TD, leaves, {path: (name, lambda leaf: leaf) for path, name in named.items()})
    routing = of(x_TD, leaves)[1]
    np.testing.assert_allclose(routing.logits_TO, theirs[f"{variant}/logits_TE"], **CLOSE)
    np.testing.assert_array_equal(routing.ids_Tk, theirs[f"{variant}/ids_Tk"])
    start = {path: leaf * (not path.endswith("/b")) for path, leaf in leaves.items()}
    np.testing.assert_allclose(of(x_TD, start)[0], theirs["base_y_TD"], **CLOSE)


@pytest.mark.parametrize("ffn", few([False, True]))
@pytest.mark.parametrize("gating", few(["top1_prob", "top1", "dense"]))
def test_mole_on_experts(gating: Gating, ffn: bool, platform: str):
    theirs = methods_arrays("mole")
    experts_of_mole, _, r = theirs["a_gate_IDr"].shape
    named: dict[str, Any] = {
        "choice/weight": ("router_DI", lambda leaf: leaf), "choice/bias": ("router_bias_I", lambda leaf: leaf),
    }  # fmt: skip
    leaves = {"choice/weight": theirs["router_DI"], "choice/bias": theirs["router_bias_I"]}
    for name, (a, b) in {"gate": ("IDr", "IrF"), "up": ("IDr", "IrF"), "down": ("IFr", "IrD")}.items():
        theirs_a, theirs_b = theirs[f"a_{name}_{a}"], theirs[f"b_{name}_{b}"]
        leaves[f"{name}/a"] = theirs_a.transpose(1, 0, 2).reshape(theirs_a.shape[1], -1)
        leaves[f"{name}/b"] = theirs_b.reshape(-1, theirs_b.shape[2])
        named[f"{name}/a"] = f"a_{name}_{a}", lambda leaf: leaf.reshape(-1, experts_of_mole, r).transpose(1, 0, 2)
        named[f"{name}/b"] = f"b_{name}_{b}", lambda leaf: leaf.reshape(experts_of_mole, r, -1)
    config = AdapterConfig(
        method="mole", rank=r, alpha=float(theirs["alpha"]), lora_experts=experts_of_mole, gating=gating
    )
    leaves = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    x_TD, variant = jnp.asarray(theirs["x_TD"]), f"{'ffn/' * ffn}{gating}"
    # The file does not say how many experts a token has: as many as give its outputs.
    E = 1 if ffn else len(theirs["w_gate_EDF"])
    of_k = [functools.partial(output, theirs, config, k=k, ffn=ffn) for k in range(1, E + 1)]
    of = min(of_k, key=lambda of: np.abs(of(x_TD, leaves)[0] - theirs[f"{variant}/y_TD"]).max())
    check(theirs, variant, of, x_TD, leaves, named)
    if gating == "top1":  # the task's loss never reaches the router
        gradient = jax.grad(lambda leaves: of(x_TD, leaves)[0].sum())(leaves)
        assert not jnp.any(gradient["choice/weight"])


@pytest.mark.parametrize("form", few(["per_layer", "released"]))
def test_balance_of_lora_experts(form: str):
    theirs = methods_arrays("mole")
    logits_ZBLI, real_BL = jnp.asarray(theirs["balance/logits_ZBLI"]), jnp.asarray(theirs["balance/real_BL"])

    def balance(logits_ZBLI):
        probs_ZBLI = jax.nn.softmax(logits_ZBLI, axis=-1)
        return BALANCE[form](probs_ZBLI.reshape(len(probs_ZBLI), -1, probs_ZBLI.shape[-1]), real_BL)

    value, gradient = jax.value_and_grad(balance)(logits_ZBLI)
    np.testing.assert_allclose(value, theirs[f"balance/{form}"], **CLOSE)
    np.testing.assert_allclose(gradient, theirs[f"balance/{form}_d_logits_ZBLI"], **CLOSE)


@pytest.mark.parametrize("variant", ["train", "evaluate"])
def test_moram_on_one_map(variant: str):
    theirs = methods_arrays("moram")
    joined = {name: np.concatenate([theirs[f"{name[0]}_{age}_{name[2:]}"] for age in ("old", "new")], axis=axis)
              for name, axis in (("a_Dr", 1), ("b_rF", 0))}  # fmt: skip
    old = theirs["a_old_Dr"].shape[1]
    options: dict[str, Any] = {"top_k": int(theirs["top_k"]), "tau": float(theirs["tau"])}
    options["threshold"] = float(theirs["delta"]) if variant == "evaluate" else None

    def of(x_TD, a_Dr, b_rF):
        z_TLr = (x_TD @ a_Dr)[:, None]
        weights_TLr = self_activated(z_TLr, jnp.ones(z_TLr.shape, bool), **options)
        return x_TD @ jnp.asarray(theirs["w_DF"]) + ((z_TLr * weights_TLr)[:, 0]) @ b_rF, weights_TLr[:, 0]

    inputs = [jnp.asarray(array) for array in (theirs["x_TD"], joined["a_Dr"], joined["b_rF"])]
    y_TF, pull, weights_Tr = jax.vjp(of, *inputs, has_aux=True)
    dx_TD, da_Dr, db_rF = pull(jnp.asarray(theirs["cotangent_TF"]))
    np.testing.assert_allclose(weights_Tr, theirs[f"{variant}/rank_weights_Tr"], **CLOSE)
    np.testing.assert_allclose(y_TF, theirs[f"{variant}/y_TF"], **CLOSE)
    np.testing.assert_allclose(dx_TD, theirs[f"{variant}/d_x_TD"], **CLOSE)
    np.testing.assert_allclose(da_Dr[:, old:], theirs[f"{variant}/d_a_new_Dr"], **CLOSE)
    np.testing.assert_allclose(db_rF[old:], theirs[f"{variant}/d_b_new_rF"], **CLOSE)


@pytest.mark.slow
def test_moram_s_fresh_atoms_change_what_old_ones_did():
    """By the stored amount: a later set is no exact start, although its B is zero."""
    theirs = methods_arrays("moram")
    x_TD, options = jnp.asarray(theirs["x_TD"]), {"top_k": int(theirs["top_k"]), "tau": float(theirs["tau"])}
    fresh = np.zeros_like(theirs["b_new_rF"])
    for name, a_Dr, b_rF in (
        ("before", theirs["a_old_Dr"], theirs["b_old_rF"]),
        (
            "after",
            np.concatenate([theirs["a_old_Dr"], theirs["a_new_Dr"]], 1),
            np.concatenate([theirs["b_old_rF"], fresh]),
        ),
    ):
        z_TLr = (x_TD @ a_Dr)[:, None]
        weights_TLr = self_activated(z_TLr, jnp.ones(z_TLr.shape, bool), threshold=None, **options)
        y_TF = x_TD @ theirs["w_DF"] + (z_TLr * weights_TLr)[:, 0] @ b_rF
        np.testing.assert_allclose(y_TF, theirs[f"grown_{name}_y_TF"], **CLOSE)


@pytest.mark.parametrize("name", ["naive/sum", "naive/mean", "damc/y"])
def test_compositions_of_low_rank_updates(name: str):
    """NaiveMC adds products up; of DAMC a span's tokens have their medium's alone, text those of text by shares."""
    theirs = methods_arrays("compose")
    x_TD, modality_T = jnp.asarray(theirs["x_TD"]), theirs["modality_T"]
    M, _, rank = theirs["a_mDr"].shape
    sets = {"": (theirs["a_mDr"], theirs["b_mrF"])}
    if name == "damc/y":
        sets[".text"] = (theirs["a_text_mDr"], theirs["b_text_mrF"])
    adapters, factors = {}, {}
    for m in range(M):
        for kind, (a_mDr, b_mrF) in sets.items():
            share = float(theirs["share_m"][m]) if kind else 1 / M if name == "naive/mean" else 1.0
            tokens = "all" if name.startswith("naive") else "text" if kind else "items"
            adapters[f"{m}{kind}"] = AdapterConfig(
                rank=rank, alpha=float(theirs["alpha"]), medium=str(m), share=share, tokens=tokens
            )
            factors[f"{m}{kind}"] = jnp.asarray(a_mDr[m]), jnp.asarray(b_mrF[m])
    spans = [int((modality_T == m).sum()) for m in range(M)]
    media = {
        str(m): Medium(kind="features", mark=f"<{m}>", tags=ImageTags(pad=m), tower=FeaturesConfig(width=1, patches=n))
        for m, n in enumerate(spans)
    }
    config = ModelConfig(decoder=DecoderConfig(), media=Named(media), adapters=Named(adapters))
    places_BL = np.full((1, len(x_TD)), -1)
    for m in range(M):
        places_BL[0, modality_T == m] = sum(spans[:m]) + np.arange(spans[m])
    row_BL = np.ones_like(places_BL)
    features = {str(m): np.zeros((1, 1, n, 1), np.float32) for m, n in enumerate(spans)}
    batch = Batch(row_BL, row_BL, row_BL, row_BL, places_BL, features=features)
    y_TF = x_TD @ jnp.asarray(theirs["w_DF"])
    for own, share_BL in shares(batch, config).items():
        scale_BL1 = Adapted(own, adapters[own], cast(Any, None), share_BL).scale_BL1(x_TD[None])
        y_TF += low_rank(x_TD, *factors[own], scale_BL1[0])
    np.testing.assert_allclose(y_TF, theirs[f"{name}_TF"], **CLOSE)
