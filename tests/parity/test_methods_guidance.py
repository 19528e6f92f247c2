"""LLaVA-DyMoE's rules: our router and losses on the logits of dymoe.npz (`methods.py`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.config import DecoderConfig, ExtensionConfig
from moextend_jax.models.guidance import exclusivity, may_choose, specialisation
from moextend_jax.models.router import NewColumns, Routing, Rule, over_their_sum, route_extended
from moextend_jax.parameters import with_arrays
from moextend_jax.train.loss import drift_per_layer
from parity.methods import methods_arrays

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


def routed(logits_TO: jax.Array, theirs: dict[str, np.ndarray], *, trains: bool, drift: float = 0.0) -> Routing:
    """Our router on inputs that are the logits, so that its columns are unit vectors."""
    E, outputs = int(theirs["experts"]), logits_TO.shape[-1]
    added = ExtensionConfig(
        layers=(0,), sources=(0,) * (outputs - E), new_experts=outputs - E, calibrator="none", trains=trains,
        guidance=float(theirs["tau"]), drift=drift,
    )  # fmt: skip
    decoder = DecoderConfig(width=outputs, experts=E)
    made = nnx.eval_shape(lambda: NewColumns(decoder, added, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    columns = with_arrays(made, {"new_gate": jnp.eye(outputs)[:, E:]})
    rule = Rule(int(theirs["top_k"]))
    return route_extended(logits_TO, jnp.eye(outputs)[:, :E], [columns], rule=rule, normalise=over_their_sum)


def test_token_guidance_in_training_alone():
    theirs = methods_arrays("dymoe")
    logits_TO, E = jnp.asarray(theirs["logits_TO"]), int(theirs["experts"])
    open_T1 = may_choose(logits_TO[:, :E], logits_TO[:, E:], tau=float(theirs["tau"]))
    np.testing.assert_array_equal(open_T1[:, 0], theirs["open_T"])
    assert 0 < theirs["open_T"].sum() < len(logits_TO)
    routing = routed(logits_TO, theirs, trains=True)
    np.testing.assert_array_equal(routing.ids_Tk, theirs["ids_Tk"])
    np.testing.assert_allclose(routing.weights_Tk, theirs["weights_Tk"], **CLOSE)
    used = routed(logits_TO, theirs, trains=False)
    np.testing.assert_array_equal(used.ids_Tk, jax.lax.top_k(logits_TO, int(theirs["top_k"]))[1])


@pytest.mark.slow
def test_losses_against_drift():
    theirs = methods_arrays("dymoe")
    logits_TO, E = jnp.asarray(theirs["logits_TO"]), int(theirs["experts"])
    for name, loss in (("exclusivity", exclusivity), ("specialisation", specialisation)):
        value, d_TO = jax.value_and_grad(lambda of_TO, loss=loss: loss(of_TO[:, :E], of_TO[:, E:]).mean())(logits_TO)
        np.testing.assert_allclose(value, theirs[name], err_msg=name, **CLOSE)
        np.testing.assert_allclose(d_TO, theirs[f"d_{name}_TO"], err_msg=name, **CLOSE)

    def of_layer(logits_TO: jax.Array) -> jax.Array:
        drift_T2 = routed(logits_TO, theirs, trains=True, drift=0.5).drift_T2
        assert drift_T2 is not None
        return drift_per_layer(drift_T2[None], jnp.ones(len(logits_TO), bool))

    value, d_TO = jax.value_and_grad(of_layer)(logits_TO)
    both = theirs["exclusivity"] + theirs["specialisation"]
    d_both_TO = theirs["d_exclusivity_TO"] + theirs["d_specialisation_TO"]
    np.testing.assert_allclose(value, 0.5 * both, **CLOSE)
    np.testing.assert_allclose(d_TO, 0.5 * d_both_TO, **CLOSE)
    assert routed(logits_TO, theirs, trains=False, drift=0.5).drift_T2 is None
