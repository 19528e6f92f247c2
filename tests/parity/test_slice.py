"""The committed slice of the reference numbers, for whoever has no folder of them: selection and load-balancing loss.

tests/test_router.py reads its router.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moextend_jax.config import DecoderConfig, ExtensionConfig, ModelConfig, with_extension
from moextend_jax.extension import routing
from moextend_jax.models.router import Routing
from moextend_jax.train.loss import aux_released, load
from parity import sets
from parity.test_selection import MODES

pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def theirs() -> dict[str, np.ndarray]:
    with np.load(oracle.SLICE) as file:
        return dict(file)


@pytest.mark.parametrize("mode", MODES)
def test_selection(theirs: dict[str, np.ndarray], mode: str):
    counts = [theirs[f"selection/{mode}/counts_{when}"] for when in ("before", "after")]
    before, after = (routing.Counts(total_ZE // 3, total_ZE - total_ZE // 3, 1, 1) for total_ZE in counts)
    chosen = routing.select(before, after, share=0.5, recipe=MODES[mode])
    layers = theirs[f"selection/{mode}/selected_layers"]
    order = np.argsort(layers)
    np.testing.assert_allclose(chosen.shift_Z, theirs[f"selection/{mode}/std"], atol=1e-9)
    assert list(chosen.layers) == layers[order].tolist()
    assert list(chosen.sources) == theirs[f"selection/{mode}/expert_idxmax"][order].tolist()


@pytest.mark.parametrize(("name", "extended"), [("vision", ()), ("moextend_pert", (1, 3))])
def test_load_balancing_loss(theirs: dict[str, np.ndarray], name: str, extended: tuple[int, ...]):
    width = 9 if extended else 8
    logits = [theirs[f"aux/{name}/router_logits/{layer}"] for layer in range(4)]
    logits = [np.pad(a_TO, ((0, 0), (0, width - a_TO.shape[1])), constant_values=-np.inf) for a_TO in logits]
    ids_ZTk = np.stack([theirs[f"aux/{name}/topk_idx/{layer}"] for layer in range(4)]).astype(np.int32)
    routed = Routing(jnp.asarray(np.stack(logits)), jnp.asarray(ids_ZTk), jnp.zeros(ids_ZTk.shape))
    config = ModelConfig(decoder=DecoderConfig(layers=4))
    if extended:
        extension = ExtensionConfig(layers=extended, sources=(0,) * len(extended))
        config = with_extension(config, extension)
    masked = aux_released(load(routed, jnp.asarray(theirs["aux/valid_T"])), config=config)
    np.testing.assert_allclose(masked, theirs[f"aux/{name}/loss_aux"], atol=sets.SIMPLE)
    if not extended:  # without a mask the released extended model gives no aux loss at all
        unmasked = aux_released(load(routed, jnp.ones(ids_ZTk.shape[1], bool)), config=config)
        np.testing.assert_allclose(unmasked, theirs[f"aux/{name}/loss_aux_nomask"], atol=sets.SIMPLE)
        assert abs(float(masked - unmasked)) > 1e-3
