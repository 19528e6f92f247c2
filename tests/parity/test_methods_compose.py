"""Two extensions of one base that were made apart, in one router; Mixtral's router on Uni-MoE's numbers.

In: compose.npz and unimoe.npz (`methods.py`). Our router and experts run on their inputs and weights; rows of a span
are those whose `modality_T` names the extension, all others are text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.config import DecoderConfig, ExtensionConfig
from moextend_jax.models.blocked_swiglu import Weights
from moextend_jax.models.experts import apply_experts
from moextend_jax.models.router import NewColumns, Routing, Rule, over_their_sum, route, route_extended
from moextend_jax.parameters import with_arrays
from parity.methods import methods_arrays

pytestmark = pytest.mark.smoke

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
OPEN, CLOSED = 0.0, -np.inf
ALONE = ("image", "audio")


class Layer(NamedTuple):
    """A layer of the base, and the new columns and experts of every extension of it."""

    x_TD: jax.Array
    gate_DE: jax.Array
    base: Weights
    slots: list[NewColumns]
    new: list[Weights]
    top_k: int


@functools.cache
def theirs() -> dict[str, np.ndarray]:
    return methods_arrays("compose")


@functools.cache
def layer() -> Layer:
    arrays = {name: jnp.asarray(array) for name, array in theirs().items() if array.dtype == np.float32}
    extensions = range(len(arrays["new_gate_mDX"]))
    return Layer(
        arrays["x_TD"],
        arrays["gate_DE"],
        (arrays["w_gate_EDF"], arrays["w_up_EDF"], arrays["w_down_EFD"]),
        [new_columns(arrays, m) for m in extensions],
        [(arrays["new_w_gate_mXDf"][m], arrays["new_w_up_mXDf"][m], arrays["new_w_down_mXfD"][m]) for m in extensions],
        theirs()["moe/union_ids_Tk"].shape[-1],
    )


def new_columns(arrays: dict[str, jax.Array], m: int) -> NewColumns:
    new_gate_DX, w_in_OA, w_out_AO = (arrays[name][m] for name in ("new_gate_mDX", "w_in_mOA", "w_out_mAO"))
    width, new_experts = new_gate_DX.shape
    decoder = DecoderConfig(width=width, experts=len(w_in_OA) - new_experts)
    extension = ExtensionConfig(
        layers=(0,), sources=(0,) * new_experts, new_experts=new_experts, calibrator_width=w_in_OA.shape[1]
    )
    abstract = nnx.eval_shape(lambda: NewColumns(decoder, extension, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    leaves = {"new_gate": new_gate_DX, "calibrator/w_in": w_in_OA, "calibrator/w_out": w_out_AO}
    columns = with_arrays(abstract, leaves)
    assert isinstance(columns, NewColumns)
    return columns


def routed(*shares: Any, only: Sequence[int] | None = None) -> Routing:
    """The router with the extensions `only` (all), each with its log share of every token or of all tokens."""
    of = layer()
    slots = of.slots if only is None else [of.slots[m] for m in only]
    log_shares = [jnp.broadcast_to(jnp.asarray(share, jnp.float32), of.x_TD.shape[:1]) for share in shares]
    return route_extended(
        of.x_TD, of.gate_DE, slots, shares=log_shares or None, rule=Rule(of.top_k), normalise=over_their_sum
    )


def output(routing: Routing, *, only: Sequence[int] | None = None) -> np.ndarray:
    of = layer()
    new = of.new if only is None else [of.new[m] for m in only]
    return np.asarray(apply_experts(of.x_TD, routing.ids_Tk, routing.weights_Tk, [of.base, *new]))


def log_shares() -> np.ndarray:
    return np.log(theirs()["share_m"].astype(np.float64)).astype(np.float32)


def decoupled(text: Sequence[float]) -> list[np.ndarray]:
    """Tokens of a span see their own extension alone, all others each with the log share `text`."""
    modality_T = theirs()["modality_T"]
    return [
        np.where(modality_T < 0, of_text, np.where(modality_T == m, OPEN, CLOSED)) for m, of_text in enumerate(text)
    ]


def test_the_base_alone():
    of = layer()
    plain = route(of.x_TD, of.gate_DE, rule=Rule(of.top_k))
    np.testing.assert_allclose(output(plain, only=()), theirs()["moe/base_TD"], **CLOSE)


@pytest.mark.parametrize("m", range(len(ALONE)))
def test_each_extension_alone(m: int):
    alone = routed(only=[m])
    np.testing.assert_allclose(output(alone, only=[m]), theirs()[f"moe/{ALONE[m]}_alone_TD"], **CLOSE)


@pytest.mark.parametrize("name", ["union", "shared"])
def test_side_by_side(name: str):
    both = routed() if name == "union" else routed(*log_shares())
    np.testing.assert_array_equal(both.ids_Tk, theirs()[f"moe/{name}_ids_Tk"])
    np.testing.assert_allclose(both.weights_Tk, theirs()[f"moe/{name}_weights_Tk"], **CLOSE)
    np.testing.assert_allclose(output(both), theirs()[f"moe/{name}_TD"], **CLOSE)


@pytest.mark.parametrize("name", ["decoupled_strict", "decoupled_shared"])
def test_decoupled(name: str):
    text = [CLOSED] * len(layer().slots) if name == "decoupled_strict" else log_shares().tolist()
    np.testing.assert_allclose(output(routed(*decoupled(text))), theirs()[f"moe/{name}_TD"], **CLOSE)


@pytest.mark.parametrize("m", range(len(ALONE)))
def test_a_share_of_nothing_takes_an_extension_out(m: int):
    only = routed(*(OPEN if other == m else CLOSED for other in range(len(layer().slots))))
    alone, E = routed(only=[m]), layer().gate_DE.shape[1]
    X = [slot.new_gate.shape[-1] for slot in layer().slots]
    first = E + sum(X[:m])  # of m's columns among all
    np.testing.assert_array_equal(
        only.ids_Tk, np.where(alone.ids_Tk < E, alone.ids_Tk, np.asarray(alone.ids_Tk) - E + first)
    )
    logits_TO = np.asarray(only.logits_TO)
    np.testing.assert_array_equal(logits_TO[:, [*range(E), *range(first, first + X[m])]], alone.logits_TO)
    assert np.isneginf(np.delete(logits_TO, [*range(E), *range(first, first + X[m])], axis=1)).all()
    np.testing.assert_array_equal(only.weights_Tk, alone.weights_Tk)
    np.testing.assert_array_equal(output(only), output(alone, only=[m]))


def test_with_every_extension_out_it_is_the_base():
    of = layer()
    neither, plain = routed(*[CLOSED] * len(of.slots)), route(of.x_TD, of.gate_DE, rule=Rule(of.top_k))
    np.testing.assert_array_equal(neither.ids_Tk, plain.ids_Tk)
    np.testing.assert_array_equal(neither.weights_Tk, plain.weights_Tk)


def test_uni_moes_mixture_is_mixtrals():
    unimoe = methods_arrays("unimoe")
    x_TD = jnp.asarray(unimoe["x_BLD"].reshape(-1, unimoe["x_BLD"].shape[-1]))
    ours = route(x_TD, jnp.asarray(unimoe["gate_DE"]), rule=Rule(unimoe["ids_Tk"].shape[-1]))
    np.testing.assert_allclose(ours.logits_TO, unimoe["logits_TE"], **CLOSE)
    np.testing.assert_array_equal(ours.ids_Tk, unimoe["ids_Tk"])
    np.testing.assert_allclose(ours.weights_Tk, unimoe["weights_Tk"], **CLOSE)
    w_gate, w_up, w_down = (jnp.asarray(unimoe[name]) for name in ("w_gate_EDF", "w_up_EDF", "w_down_EFD"))
    y_TD = apply_experts(x_TD, ours.ids_Tk, ours.weights_Tk, [(w_gate, w_up, w_down)])
    np.testing.assert_allclose(y_TD, unimoe["y_unadapted_TD"], **CLOSE)
