"""Scores of experts by weights and gradients, against `jax.grad` of each expert's own matrices."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
import tiny

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.extension.saliency import FIRST_MAP, SCORES, expert_norms
from moextend_jax.runs.making import make
from moextend_jax.runs.models_of import selection_of
from moextend_jax.runs.run import open_run
from moextend_jax.settings import SelectSettings
from moextend_jax.train.loss import losses

OPTIONS = {"recipe": RECIPES["paper"], "aux_coefficient": 0.01, "chunk": 8}


def test_scores_are_of_each_expert_s_first_map():
    arrays, batches = tiny.arrays(tiny.PLAIN), [tiny.batch(seed=seed) for seed in range(2)]
    norms = expert_norms(tiny.structure(tiny.PLAIN), arrays, batches, **OPTIONS)

    @jax.jit
    def gradient(own, batch):
        made = tiny.with_arrays_of(tiny.PLAIN, {**arrays, **own})
        return losses(made, batch, **OPTIONS)[0].total

    own = {path: arrays[path] for path in FIRST_MAP}
    of_batches = [jax.grad(gradient)(own, batch) for batch in batches]
    z, e = 1, 2  # one expert, by hand
    W, G = (np.concatenate([np.ravel(of[path][z, e]) for path in FIRST_MAP]) for of in (own, _mean(of_batches)))
    V = np.mean([np.concatenate([np.ravel(g[path][z, e]) for path in FIRST_MAP]) ** 2 for g in of_batches], axis=0)
    w, g, v = (np.linalg.norm(of) for of in (W, G, V))
    expected = {"weights": w, "saliency": w * g, "gradient": g**2, "fisher": g**2 / (v + 1e-8)}
    assert expected.keys() == SCORES.keys()
    for name, score in SCORES.items():
        np.testing.assert_allclose(score(norms)[z, e], expected[name], rtol=1e-4, err_msg=name)
        assert score(norms).shape == (tiny.DECODER.layers, tiny.DECODER.experts)


def _mean(trees):
    return jax.tree.map(lambda *leaves: jnp.mean(jnp.stack(leaves), axis=0), *trees)


def test_a_base_in_few_bits_has_no_gradient():
    config = dataclasses.replace(tiny.PLAIN, expert_storage="int8", expert_group=4)
    with pytest.raises(MoextendError, match="a gradient of the pretrained experts, which are int8 in groups of 4"):
        expert_norms(tiny.structure(config), {}, [], **OPTIONS)


@pytest.mark.slow
def test_a_run_copies_the_experts_with_the_largest_scores(tmp_path: Path):
    """Where questions alone are counted, gradients are still of conversations, whose answers have a loss."""
    captions = dataclasses.replace(RECIPES["paper"], probe_data="captions")
    settings = random_run.settings(tiny.write_base(tmp_path / "base"), recipe=captions)
    select = SelectSettings(held_out=6, batch_size=6, source="saliency", new_experts=2)
    run = open_run(dataclasses.replace(settings, select=select), tmp_path / "w")
    for name in ("align", "extend", "select"):
        make(run, name)
    record = selection_of(run, "image")
    scores_ZE = np.array(record["scores"])
    best = [np.argsort(-scores_ZE[layer])[:2].tolist() for layer in record["chosen_layers"]]
    assert record["sources"] == sum(best, []) and (scores_ZE > 0).any(axis=1).all()
