"""After real steps of every stage frozen leaves are bit-identical, trained ones moved, and nothing was a constant."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.extend.core import jaxprs_in_params
from tiny import few

from moextend_jax.config import IGNORE, RECIPES, Batch, Named
from moextend_jax.models import blocked_attention
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.settings import OptimizerConfig
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import make_optimizer
from moextend_jax.train.step import TrainState, init_state, make_step

pytestmark = pytest.mark.smoke


def hashes(leaves) -> dict[str, str]:
    return {path: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for path, leaf in leaves.items()}


def schedule(_):
    return 1e-2


@functools.cache
def compiled(stage: str):
    return built(stage)


def built(
    stage: str, *, accumulate: int = 1, aux_coefficient: float = 0.01, schedule=schedule, config=tiny.EXTENDED,
    optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 (immutable)
):  # fmt: skip
    """The stage's jitted step, a fresh state, and the frozen leaves."""
    dtypes = {path: param.dtype for path, param in by_path(nnx.state(tiny.structure(config), nnx.Param)).items()}
    arrays = {path: leaf.astype(dtypes[path]) for path, leaf in tiny.arrays(config).items()}
    trainable, frozen = stages.split(arrays, tiny.STAGES[stage])
    made = make_optimizer(optimizer, paths=trainable)
    step = make_step(
        tiny.structure(config),
        optimizer=made,
        schedule=schedule,
        recipe=RECIPES["paper"],
        aux_coefficient=aux_coefficient,
        loss_chunk=4,
        accumulate=accumulate,
    )
    return step, init_state(jax.tree.map(lambda leaf: leaf.copy(), trainable), made), frozen


@pytest.mark.parametrize("stage", few(tiny.STAGES, "finetune"))
def test_three_steps_change_what_the_stage_trains_and_not_one_bit_else(stage: str):
    step, state, frozen = compiled(stage)
    before, frozen_before = hashes(state.trainable), hashes(frozen)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for count in range(3):
        state, metrics = step(state, frozen, tiny.batch(seed=count, pixels=stage == "full"))
        assert all(np.isfinite(value).all() for value in metrics.values()), metrics
        assert float(metrics["grad_norm"]) > 0 and float(metrics["learning_rate"]) == np.float32(1e-2)
        assert int(metrics["labelled_tokens"]) == (tiny.batch(seed=count).labels_BL[:, 1:] != -100).sum()
        assert int(metrics["tokens"]) == (tiny.batch(seed=count).segments_BL > 0).sum()
    assert int(state.step) == 3
    assert hashes(frozen) == frozen_before
    unmoved = {path for path, digest in hashes(state.trainable).items() if digest == before[path]}
    # Only the contrastive loss of pretraining reads the tower's last norm.
    assert unmoved == (
        {path for path in before if path.startswith("media/image/tower/post_norm")} if stage == "full" else set()
    )


def test_the_loss_falls():
    step, state, frozen = compiled("finetune")
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    seen = []
    for _ in range(12):
        state, metrics = step(state, frozen, tiny.batch())
        seen.append(float(metrics["loss"]))
    assert seen[-1] < seen[0] - 0.05


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_no_parameter_is_a_constant_of_the_program(stage: str):
    step, state, frozen = compiled(stage)
    jaxpr = tiny.traced(step, state, frozen, tiny.batch()).jaxpr
    assert max((np.size(const) for const in jaxpr.consts), default=0) <= tiny.DECODER.layers
    arguments = {leaf.aval.shape for leaf in jaxpr.jaxpr.invars}
    for path, leaf in frozen.items():
        assert leaf.shape in arguments, path


@functools.cache
def in_parts(accumulate: int):
    """Without load balancing, whose loss is a product of means over each part."""
    return built("finetune", accumulate=accumulate, aux_coefficient=0.0, schedule=lambda step: 1e-3 * (1.0 + step))


def run_in_parts(accumulate: int, *batches: Batch) -> Iterator[tuple[TrainState, dict[str, jax.Array]]]:
    step, state, frozen = in_parts(accumulate)
    state = jax.tree.map(lambda leaf: leaf.copy(), state)
    for batch in batches:
        state, metrics = step(jax.tree.map(lambda leaf: leaf.copy(), state), frozen, batch)
        yield state, metrics


@pytest.mark.parametrize("labels", few(["many", "two"]))
@pytest.mark.parametrize("parts", few([2, 4]))
def test_a_batch_in_parts_gives_the_update_of_the_whole(parts: int, labels: str):
    """Also where there are fewer labels than parts."""
    batch = tiny.batch(rows=4)
    if labels == "two":
        labels_BL = np.full_like(batch.labels_BL, IGNORE)
        labels_BL[:2, 3] = batch.ids_BL[:2, 3]
        batch = batch._replace(labels_BL=labels_BL)
    ((expected, metrics),), ((state, metrics_of_parts),) = run_in_parts(1, batch), run_in_parts(parts, batch)
    for name in metrics.keys() - {"aux"}:
        np.testing.assert_allclose(metrics_of_parts[name], metrics[name], rtol=1e-5, err_msg=name)
    for path, leaf in expected.trainable.items():
        np.testing.assert_allclose(state.trainable[path], leaf, atol=1e-5, rtol=0, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
@pytest.mark.parametrize("dense_layers", [1, 0])
def test_below_the_lowest_layer_that_trains_there_is_no_backward_pass_and_the_gradient_is_the_same(
    remat: str, dense_layers: int
):
    plain = dataclasses.replace(tiny.PLAIN, remat=remat)
    if dense_layers:
        decoder = dataclasses.replace(plain.decoder, layers=4, dense_layers=1, dense_hidden=16)
        plain = dataclasses.replace(plain, decoder=decoder)
    frozen = dataclasses.replace(tiny.EXTENSION, layers=(plain.decoder.routed[0],), sources=(2,))
    late = dataclasses.replace(tiny.EXTENSION, layers=(plain.decoder.routed[2],), sources=(1,))
    config = dataclasses.replace(plain, extensions=Named({"first": frozen, "image": late}))
    arrays = tiny.arrays(config)
    trainable, rest = stages.split(arrays, ["extensions/image/*"])
    model = stages.for_training(tiny.structure(config), trainable)
    assert model.config.gradient_from == plain.decoder.routed[2]

    def loss(model):
        def of(trainable):
            whole = with_arrays(model, trainable | rest)
            options = {"recipe": RECIPES["paper"], "aux_coefficient": 0.1, "chunk": 4}
            return losses(whole, tiny.batch(), **options)[0].total

        return jax.value_and_grad(of)

    whole = tiny.structure(dataclasses.replace(model.config, gradient_from=0))
    (value, gradient), (expected, expected_gradient) = (jax.jit(loss(of))(trainable) for of in (model, whole))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for path, leaf in gradient.items():
        np.testing.assert_allclose(leaf, expected_gradient[path], atol=1e-6, err_msg=path)
    backward = [_reverse_scans(jax.make_jaxpr(loss(of))(trainable).jaxpr) for of in (model, whole)]
    assert 1 in backward[0] and len(plain.decoder.routed) not in backward[0]
    assert len(plain.decoder.routed) in backward[1]


@pytest.mark.slow
@pytest.mark.parametrize("remat", few(["layer", "none"]))
def test_frozen_experts_are_not_taken_out_of_their_stack(remat: str):
    """A step of finetune reads them where they lie: the same loss and gradients, and no layer's matrices apart."""
    config = dataclasses.replace(tiny.EXTENDED, remat=remat)
    trainable, rest = stages.split(tiny.arrays(config), ["extensions/*"])
    model = stages.for_training(tiny.structure(config), trainable)
    assert model.config.frozen_experts == "pretrained"
    copying = tiny.structure(dataclasses.replace(model.config, frozen_experts="none"))

    def loss(model):
        def of(trainable):
            options = {"recipe": RECIPES["paper"], "aux_coefficient": 0.1, "chunk": 4}
            return losses(with_arrays(model, trainable | rest), tiny.batch(), **options)[0].total

        return jax.value_and_grad(of)

    got, expected = (jax.jit(loss(of))(trainable) for of in (model, copying))
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    E, D, F = model.config.decoder.experts, model.config.decoder.width, model.config.decoder.hidden
    layer, lying, taken = (
        f"f32[{E},{D},{F}]",
        *(jax.jit(loss(of)).lower(trainable).compile().as_text() or "" for of in (model, copying)),
    )
    if jax.default_backend() == "cpu":
        assert layer in taken and layer not in lying


def test_a_step_that_trains_the_base_takes_its_experts_as_arrays():
    trainable, _ = stages.split(tiny.arrays(tiny.PLAIN), ["decoder/*"])
    assert stages.for_training(tiny.structure(tiny.PLAIN), trainable).config.frozen_experts == "none"


def _reverse_scans(jaxpr) -> list[int]:
    """Lengths of the scans that run backwards, but those inside of them."""
    lengths = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["reverse"]:
            lengths.append(equation.params["length"])
        elif equation.primitive.name != "scan":
            for inside in jaxprs_in_params(equation.params):
                lengths += _reverse_scans(inside)
    return lengths


def test_a_skipped_step_uses_up_its_place_in_the_schedule_and_the_logged_rate_is_the_one_used():
    """Adam's first update has the size of the rate, whatever the gradient's."""
    good = tiny.batch(rows=4)
    bad = good._replace(features={"image": good.features["image"] * np.nan})
    before, rates = in_parts(1)[1].trainable, (1e-3, 2e-3, 3e-3)
    for rate, (state, metrics) in zip(rates, run_in_parts(1, bad, bad, good), strict=True):
        moved = max(float(jnp.abs(leaf - before[path]).max()) for path, leaf in state.trainable.items())
        assert metrics["learning_rate"] == np.float32(rate)
        np.testing.assert_allclose(moved, rate if metrics["finite"] else 0, rtol=1e-3)
    assert int(state.step) == 3 and int(state.skipped) == 2


@pytest.mark.slow
def test_moments_on_the_host_give_the_same_bits_and_stay_there():
    """Also through a step whose gradient is not finite, which leaves them as they are."""
    good = tiny.batch(rows=4)
    bad = good._replace(features={"image": good.features["image"] * np.nan})
    ends = []
    for moments in ("device", "host"):
        step, state, frozen = built("finetune", optimizer=OptimizerConfig(moments=moments))
        kind = {"device": "device", "host": "pinned_host"}[moments]
        for batch in (good, bad, good):
            state, _ = step(state, frozen, batch)
            kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim}
            assert kinds == {kind} and {leaf.sharding.memory_kind for leaf in state.trainable.values()} == {"device"}
        assert int(state.skipped) == 1
        ends.append([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)])
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_a_step_in_bfloat16_on_cpu(monkeypatch: pytest.MonkeyPatch):
    """With rows above a block of attention; leaves keep their dtypes, moments are float32."""
    monkeypatch.setattr(blocked_attention, "BLOCK", 8)

    def dtypes(state: TrainState) -> list[Any]:
        return [leaf.dtype for leaf in jax.tree.leaves(state)]

    config = dataclasses.replace(tiny.EXTENDED, dtype="bfloat16", remat="layer")
    for train_dtype in ("float32", "bfloat16"):
        step, state, frozen = built("finetune", config=dataclasses.replace(config, train_dtype=train_dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim} == {jnp.dtype("float32")}
        assert dtypes(tiny.traced(step, state, frozen, tiny.batch()).out_info[0]) == dtypes(state)
    _, metrics = step(state, frozen, tiny.batch())
    whole, state, frozen = compiled("finetune")
    _, expected = whole(jax.tree.map(lambda leaf: leaf.copy(), state), frozen, tiny.batch())
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=2e-2)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=5e-2)


def test_activations_keep_the_dtype_of_the_model():
    """A float32 projector among bfloat16 weights must not lift all that follows to float32."""
    config = dataclasses.replace(tiny.EXTENDED, dtype="bfloat16")
    structure = tiny.structure(config)

    def run(batch):
        return with_arrays(structure, {path: leaf.astype(param.dtype) for (path, leaf), param in params})(batch)

    params = list(zip(tiny.arrays(config).items(), by_path(nnx.state(structure, nnx.Param)).values(), strict=True))
    decoded = jax.eval_shape(run, tiny.batch())
    assert decoded.hidden_BLD.dtype == decoded.keys_values.keys_BKSH.dtype == jnp.bfloat16
    assert decoded.routing.weights_Tk.dtype == jnp.float32
