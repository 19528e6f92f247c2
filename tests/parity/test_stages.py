"""Stages of training: gradients of the first batch, losses and norms of each step, parameters after them."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
import oracle
import pytest
from tiny import few

from moextend_jax.checkpoints import names
from moextend_jax.compare.forward import equal_columns
from moextend_jax.config import ModelConfig
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.results import FIRST
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import OptimizerConfig, make_optimizer
from moextend_jax.train.step import init_state, make_step
from parity import sets

pytestmark = [pytest.mark.smoke, pytest.mark.parametrize("folder", sets.LONG, indirect=True)]

STAGES = {
    "align_vision": ("align", "vision"),
    "extend_vision": ("extend", "vision"),
    "finetune_pert": ("finetune", "moextend_pert"),
    "finetune_init": ("finetune", "moextend_init"),
}
"""Files, stage_NAME.npz: the stage and the model it starts from."""
METRICS = ("loss", "ce", "aux", "grad_norm")
LEARNING_RATE, CHUNK = 1e-3, 5


@pytest.mark.parametrize(
    ("name", "remat"),
    [
        ("finetune_pert", "layer"),
        pytest.param("extend_vision", "layer", marks=pytest.mark.slow),
        pytest.param("align_vision", "attention", marks=pytest.mark.slow),
    ],
)
def test_gradients(folder: Path, name: str, remat: str):
    """With parts computed again in the backward pass; the steps below store everything."""
    theirs = _parts(folder, name).get("grad")
    if theirs is None:
        pytest.skip(f"stage_{name}.npz holds no gradients")
    stage, start = STAGES[name]
    structure, arrays, config = sets.model(folder, start, remat=remat)
    trainable, frozen = stages.split(arrays, FIRST.patterns(stage, recipe=sets.RELEASED))
    coefficient = sets.coefficient(folder)

    def total(trainable, frozen, batch):
        model = with_arrays(structure, {**trainable, **frozen})
        return losses(model, batch, recipe=sets.RELEASED, aux_coefficient=coefficient, chunk=CHUNK)[0].total

    gradient = jax.jit(jax.grad(total))(trainable, frozen, sets.batches(folder, ("train0",))["train0"])
    _assert_close(gradient, theirs, config, atol=sets.SIMPLE)


@pytest.mark.parametrize("name", few(STAGES, "finetune_pert", "finetune_init"))
def test_losses_norms_and_parameters_of_every_step(folder: Path, name: str):
    parts = _parts(folder, name)
    if "steps" not in parts:
        pytest.skip(f"stage_{name}.npz holds no steps")
    stage, start = STAGES[name]
    _, arrays, config = sets.model(folder, start)
    trainable, frozen = stages.split(arrays, FIRST.patterns(stage, recipe=sets.RELEASED))
    optimizer, step = _step(folder, config, tuple(trainable))
    state = init_state({path: leaf.copy() for path, leaf in trainable.items()}, optimizer)
    expected = parts["steps"][""]
    assert expected.ndim == 2 and expected.shape[1] == len(METRICS)
    rows = sets.batches(folder, tuple(f"train{count}" for count in range(len(expected))))
    # A new router column that equals its source ties with it, and rounding decides the top-k: the losses of the first
    # step do not depend on it, gradients and what comes after them do.
    tied = bool(equal_columns(arrays, config))
    for count in range(1 if tied else len(expected)):
        state, metrics = step(state, frozen, rows[f"train{count}"])
        ours = [float(metrics[metric]) for metric in METRICS]
        if tied:
            np.testing.assert_allclose(ours[:3], expected[0, :3], atol=sets.SIMPLE)
            continue
        np.testing.assert_allclose(ours, expected[count], atol=sets.COMPOSED)
        if theirs := parts.pop(f"param{count + 1}", None):
            _assert_close(state.trainable, theirs, config, atol=sets.COMPOSED)
    assert tied or set(parts) <= {"grad", "steps"}, "parts that no step of the file reaches"


@functools.cache
def _step(folder: Path, config: ModelConfig, trained: tuple[str, ...]):
    """(optimizer, compiled step), one for all models of this configuration."""

    def schedule(_):
        return LEARNING_RATE

    settings = OptimizerConfig(learning_rate=LEARNING_RATE)
    optimizer = make_optimizer(settings, paths=dict.fromkeys(trained))
    step = make_step(
        oracle.structure(config),
        optimizer=optimizer,
        schedule=schedule,
        recipe=sets.RELEASED,
        aux_coefficient=sets.coefficient(folder),
        loss_chunk=CHUNK,
    )
    return optimizer, step


def _parts(folder: Path, name: str) -> dict[str, dict[str, np.ndarray]]:
    """{grad | paramN | steps: {tensor: array}}; anything else in the file fails."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in sets.arrays(folder, f"stage_{name}").items():
        part, _, tensor = key.partition("/")
        assert re.fullmatch(r"grad|param\d+|steps", part) and (tensor == "") == (part == "steps"), f"unknown: {key}"
        parts.setdefault(part, {})[tensor] = array
    return parts


def _assert_close(ours: dict[str, Any], theirs: dict[str, np.ndarray], config: ModelConfig, *, atol: float):
    """Compares our stacked arrays with the released code's, tensor by tensor, none left out on either side."""
    tensors = [tensor for tensor in names.tensors("released", config) if tensor.path in ours]
    assert {tensor.file for tensor in tensors} == set(theirs)
    for tensor in tensors:
        layout = tensor.layout
        value = einops.rearrange(theirs[tensor.file], layout, **names.axis_sizes(layout, config.sizes()))
        np.testing.assert_allclose(ours[tensor.path][tensor.index], value, atol=atol, rtol=0, err_msg=tensor.file)
