"""On a mesh of eight devices every stage's loss, gradient and update equal those of one device."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from moextend_jax.config import RECIPES, MoextendError
from moextend_jax.models import blocked_attention
from moextend_jax.models.parameters import with_arrays
from moextend_jax.sharding import MESH_AXES, make_mesh, parameter_shardings, put_batch
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import OptimizerConfig, make_optimizer
from moextend_jax.train.step import init_state, make_step

pytestmark = [pytest.mark.devices, pytest.mark.usefixtures("eight_devices")]

MESHES = {"data": (8, 1, 1, 1), "two by four": (2, 4, 1, 1), "fsdp and expert": (1, 4, 2, 1), "tensor": (2, 2, 1, 2)}
MODEL = dataclasses.replace(tiny.EXTENDED, decoder=dataclasses.replace(tiny.DECODER, vocab_size=64))


def sharded(shape: tuple[int, ...], rows: int):
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    shardings = parameter_shardings(tiny.structure(MODEL), mesh)
    arrays = {path: jax.device_put(leaf, shardings[path]) for path, leaf in tiny.arrays(MODEL).items()}
    return mesh, arrays, put_batch(tiny.batch(rows=rows), mesh)


def value_and_gradient(stage: str):
    structure = tiny.structure(MODEL)

    @jax.jit
    def run(trainable, frozen, batch):
        def total(trainable):
            whole = with_arrays(structure, {**trainable, **frozen})
            return losses(whole, batch, recipe=RECIPES["paper"], aux_coefficient=0.01, chunk=5)[0].total

        return jax.value_and_grad(total)(trainable)

    return run, lambda arrays: stages.split(arrays, stages.patterns(stage, recipe=RECIPES["paper"]))


@pytest.mark.parametrize(
    ("stage", "shape"),
    [("align", "data"), ("align", "tensor"), ("extend", "fsdp and expert"), ("finetune", "two by four")]
    + [("finetune", "tensor"), ("full_text", "fsdp and expert")],
)
def test_loss_and_gradient_do_not_depend_on_the_mesh(stage: str, shape: str, monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 4)  # rows of 14 are long then
    run, split = value_and_gradient(stage)
    expected = run(*split(tiny.arrays(MODEL)), tiny.batch(rows=8))
    mesh, arrays, batch = sharded(MESHES[shape], rows=8)
    with jax.set_mesh(mesh):
        got = run(*split(arrays), batch)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    for path, gradient in expected[1].items():
        np.testing.assert_allclose(got[1][path], gradient, atol=1e-5, rtol=0, err_msg=path)


def test_rows_that_do_not_divide_go_to_every_device():
    run, split = value_and_gradient("align")
    expected = run(*split(tiny.arrays(MODEL)), tiny.batch(rows=3))
    mesh, arrays, batch = sharded((8, 1, 1, 1), rows=3)
    with jax.set_mesh(mesh):
        got = run(*split(arrays), batch)
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)


def test_two_steps_on_a_mesh():
    def schedule(_):
        return 1e-2

    def train(arrays, batch):
        trainable, frozen = stages.split(arrays, stages.STAGES["finetune"])
        optimizer = make_optimizer(OptimizerConfig(), paths=trainable, schedule=schedule)
        step = make_step(
            tiny.structure(MODEL), optimizer=optimizer, schedule=schedule, recipe=RECIPES["paper"],
            aux_coefficient=0.01, loss_chunk=4,
        )  # fmt: skip
        state = init_state(jax.tree.map(lambda leaf: leaf.copy(), trainable), optimizer)
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        return state, metrics

    expected, expected_metrics = train(tiny.arrays(MODEL), tiny.batch(rows=8))
    mesh, arrays, batch = sharded((2, 4, 1, 1), rows=8)
    with jax.set_mesh(mesh):
        state, metrics = train(arrays, batch)
    np.testing.assert_allclose(metrics["grad_norm"], expected_metrics["grad_norm"], rtol=1e-4)
    for path, leaf in expected.trainable.items():
        np.testing.assert_allclose(state.trainable[path], leaf, atol=1e-4, rtol=0, err_msg=path)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(MoextendError, match="does not cover 8 devices"):
        make_mesh({"data": 3, "fsdp": 1, "expert": 1, "tensor": 1})
