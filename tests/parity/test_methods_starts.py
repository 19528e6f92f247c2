"""How a new expert starts: our router and experts on the inputs and weights of init_new_expert.npz (`methods.py`)."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moextend_jax.config import ColumnStart, DecoderConfig, ExtensionConfig, StartName
from moextend_jax.extension.grow import COLUMNS
from moextend_jax.models.experts import apply_experts
from moextend_jax.models.router import NewColumns, Routing, Rule, over_their_sum, route, route_extended
from moextend_jax.parameters import with_arrays
from parity.methods import methods_arrays

pytestmark = pytest.mark.smoke

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}


@functools.cache
def theirs() -> dict[str, np.ndarray]:
    return methods_arrays("init_new_expert")


def routed(start: StartName, *, lowered_by: float = 0.0, column: ColumnStart = "copy") -> Routing:
    """Of twins the tokens that may choose them are those of `open_T`, of others all."""
    arrays = theirs()
    (D, E), source = arrays["gate_DE"].shape, int(arrays["source"])
    added = ExtensionConfig(layers=(0,), sources=(source,), start=start, calibrator_width=2)
    decoder = DecoderConfig(width=D, experts=E)
    made = nnx.eval_shape(lambda: NewColumns(decoder, added, rngs=nnx.Rngs(0), dtype="float32", std=1.0))
    leaves = {"new_gate": arrays["gate_DE"][:, [source]]}
    if (changed := COLUMNS[column]) is not None:
        random_YDX = jnp.asarray(arrays["random_column_D"])[None, :, None]
        leaves["new_gate"] = np.asarray(changed(jnp.asarray(arrays["gate_DE"])[None], random_YDX)[0])
    leaves |= {"calibrator/w_in": np.ones((E + 1, 2)), "calibrator/w_out": np.zeros((2, E + 1))}
    leaves |= {"offset": np.full(1, -lowered_by)} if start == "lowered" else {}
    columns = with_arrays(made, {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})
    open_T = jnp.where(arrays["open_T"], 0.0, -jnp.inf) if start == "twin" else None
    return route_extended(
        jnp.asarray(arrays["x_TD"]), jnp.asarray(arrays["gate_DE"]), [columns], shares=[open_T],
        sources=[jnp.array([source])], rule=Rule(int(arrays["top_k"])), normalise=over_their_sum,
    )  # fmt: skip


def route_of_base() -> Routing:
    return route(jnp.asarray(theirs()["x_TD"]), jnp.asarray(theirs()["gate_DE"]), rule=Rule(int(theirs()["top_k"])))


def output(routing: Routing, *, zero_down: bool = False) -> np.ndarray:
    names, source = ("w_gate_EDF", "w_up_EDF", "w_down_EFD"), int(theirs()["source"])
    base = [jnp.asarray(theirs()[name]) for name in names]
    gate, up, down = (leaf[source][None] for leaf in base)
    new = (gate, up, down * 0 if zero_down else down)
    x_TD = jnp.asarray(theirs()["x_TD"])
    return np.asarray(apply_experts(x_TD, routing.ids_Tk, routing.weights_Tk, [(base[0], base[1], base[2]), new]))


def weights(routing: Routing) -> np.ndarray:
    weights_TO = np.zeros((len(routing.logits_TO), routing.logits_TO.shape[-1] + 1))  # the last is nobody
    np.put_along_axis(weights_TO, np.asarray(routing.ids_Tk), np.asarray(routing.weights_Tk), axis=1)
    return weights_TO[:, :-1]


@pytest.mark.parametrize(
    ("name", "start", "lowered_by"),
    [
        ("copy", "copy", 0.0),
        ("logit_lowered_by_2", "lowered", 2.0),
        ("logit_lowered_by_4", "lowered", 4.0),
        ("twin", "twin", 0.0),
        ("added_zero_down", "added", 0.0),
    ],
)
def test_weights_and_outputs(name: str, start: StartName, lowered_by: float):
    ours = routed(start, lowered_by=lowered_by)
    np.testing.assert_allclose(output(ours, zero_down=start == "added"), theirs()[f"{name}/y_TD"], **CLOSE)
    expected_TO = theirs()[f"{name}/weights_TO"]
    # Where the source is the last pick both have its logit, and theirs leaves it to rounding which of them is.
    last_T = np.asarray(route_of_base().ids_Tk)[:, -1] == int(theirs()["source"])
    clear_T = ~last_T | (start in ("twin", "lowered"))
    np.testing.assert_allclose(weights(ours)[clear_T], expected_TO[clear_T], **CLOSE)
    assert (expected_TO[:, -1] > 0).any() or start == "lowered"


@pytest.mark.parametrize("column", ["zero", "mean", "random"])
def test_weights_and_outputs_of_columns_that_are_no_copies(column: ColumnStart):
    ours = routed("copy", column=column)
    np.testing.assert_allclose(weights(ours), theirs()[f"{column}_column/weights_TO"], **CLOSE)
    np.testing.assert_allclose(output(ours), theirs()[f"{column}_column/y_TD"], **CLOSE)


def test_a_copy_with_a_down_projection_of_zeros_among_the_picks():
    """But where the source is the last pick, and rounding chooses between it and the copy."""
    clear_T = np.asarray(route_of_base().ids_Tk)[:, -1] != int(theirs()["source"])
    ours, expected = output(routed("copy"), zero_down=True), theirs()["zero_down_within_top-k/y_TD"]
    np.testing.assert_allclose(ours[clear_T], expected[clear_T], **CLOSE)
    assert clear_T.sum() > len(clear_T) / 2 and np.abs(ours - output(route_of_base())).max() > 0.1


def test_what_is_exact_is_the_base():
    base = route_of_base()
    base_TD = output(base)
    np.testing.assert_allclose(base_TD, theirs()["base_y_TD"], **CLOSE)
    for start in ("twin", "added"):
        ours = routed(start)
        np.testing.assert_allclose(output(ours, zero_down=start == "added"), base_TD, **CLOSE)
        np.testing.assert_array_equal(ours.weights_Tk[:, : base.ids_Tk.shape[1]], base.weights_Tk)
