"""On a mesh of eight devices every stage's loss, gradient and update equal those of one device."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import folders
import jax
import numpy as np
import pytest
import tiny
from tiny import few

from moextend_jax.checkpoints import quantising
from moextend_jax.checkpoints.leaves import read_sharded
from moextend_jax.config import RECIPES, ModelConfig, MoextendError, YarnConfig, with_vision
from moextend_jax.extension import routing
from moextend_jax.families import FAMILIES
from moextend_jax.families.towers import TOWERS
from moextend_jax.mesh import make_mesh, one_device, place_rows
from moextend_jax.models import blocked_attention
from moextend_jax.parameters import with_arrays
from moextend_jax.settings import OptimizerConfig
from moextend_jax.sharding import MESH_AXES, items_to_add, parameter_shardings
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import make_optimizer
from moextend_jax.train.step import TrainState, abstract_state, init_state, make_step

pytestmark = pytest.mark.usefixtures("eight_devices")

MESHES = {
    "data": (8, 1, 1, 1), "fsdp": (1, 8, 1, 1), "expert": (1, 1, 8, 1), "no tensor": (2, 2, 2, 1),
    "no data": (1, 2, 2, 2),
}  # fmt: skip
MODEL = dataclasses.replace(tiny.EXTENDED, decoder=dataclasses.replace(tiny.DECODER, vocab_size=64))


BATCHES = [tiny.batch(rows=8, seed=seed, pixels=True) for seed in range(3)]


def sharded(shape: tuple[int, ...], model: ModelConfig = MODEL):
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    shardings = parameter_shardings(tiny.structure(model), mesh)
    arrays = {path: jax.device_put(leaf, shardings[path]) for path, leaf in tiny.arrays(model).items()}
    return mesh, arrays


def value_and_gradient(stage: str, structure=None):
    structure = structure or tiny.structure(MODEL)

    @jax.jit
    def run(trainable, frozen, batch):
        def total(trainable):
            whole = with_arrays(structure, {**trainable, **frozen})
            return losses(whole, batch, recipe=RECIPES["paper"], aux_coefficient=0.01, chunk=5)[0].total

        return jax.value_and_grad(total)(trainable)

    return run, lambda arrays: stages.split(arrays, tiny.STAGES[stage])


class Trained(NamedTuple):
    """`first`: optimizer state after one step, whose first moments are the gradient; `last`: after three."""

    first: Any
    last: TrainState
    losses: list[dict[str, float]]
    counts: routing.Counts


def three_steps(
    stage: str, arrays, batches, mesh=None, model: ModelConfig = MODEL, *, moments: Literal["device", "host"] = "device"
) -> Trained:
    def schedule(_):
        return 1e-3

    trainable, frozen = stages.split(arrays, tiny.STAGES[stage])
    # Adam divides by the gradient's size, so a gradient of 1e-8 would be all rounding without an epsilon above it.
    optimizer = make_optimizer(OptimizerConfig(eps=1e-4, moments=moments), paths=trainable)
    step = make_step(
        tiny.structure(model), optimizer=optimizer, schedule=schedule, recipe=RECIPES["paper"],
        aux_coefficient=0.01, loss_chunk=5, mesh=mesh,
    )  # fmt: skip
    counts = routing.count_all(tiny.structure(model), arrays, iter(batches), recipe=RECIPES["paper"], mesh=mesh)
    shardings = None
    if mesh is not None:
        like = abstract_state(trainable, optimizer, mesh=mesh, moments=moments)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    copy = jax.tree.map(lambda leaf: leaf.copy(), trainable)
    state, seen, first = init_state(copy, optimizer, shardings=shardings), [], None
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        seen.append({name: np.asarray(value, float) for name, value in metrics.items()})
        first = first or jax.tree.map(np.asarray, state.optimizer)
    return Trained(first, jax.tree.map(np.asarray, state), seen, counts)


@functools.cache
def on_one_device(stage: str) -> Trained:
    return three_steps(stage, tiny.arrays(MODEL), BATCHES)


MARKS = {("finetune", "no data"): (), ("finetune", "no tensor"): ()} | dict.fromkeys(
    [("extend", "no tensor"), ("full", "no data")], pytest.mark.slow
)
CASES = [
    pytest.param(stage, shape, marks=MARKS.get((stage, shape), pytest.mark.long))
    for stage in ("align", "extend", "finetune", "full")
    for shape in MESHES
]


@pytest.mark.parametrize(("stage", "shape"), CASES)
def test_losses_gradients_routing_and_updates_do_not_depend_on_the_mesh(stage: str, shape: str, monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK", 4)  # rows of 14 are long then
    expected = on_one_device(stage)
    mesh, arrays = sharded(MESHES[shape])
    assert_same(three_steps(stage, arrays, [place_rows(batch, mesh) for batch in BATCHES], mesh), expected)


@pytest.mark.slow
def test_moments_on_the_host_are_sharded_as_on_the_devices():
    """Over one axis: over fsdp, expert and tensor together XLA's CPU client now and then waits for ever, as it does
    with experts in few bits (below)."""
    mesh, arrays = sharded(MESHES["fsdp"])
    batches = [place_rows(batch, mesh) for batch in BATCHES]
    host, device = (three_steps("finetune", arrays, batches, mesh, moments=moments) for moments in ("host", "device"))
    for mine, theirs in zip(jax.tree.leaves((host.first, host.last)), jax.tree.leaves((device.first, device.last)),
                            strict=True):  # fmt: skip
        assert mine.tobytes() == theirs.tobytes()


def assert_same(got: Trained, expected: Trained) -> None:
    for mine, theirs in zip(got.losses, expected.losses, strict=True):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, rtol=1e-5, err_msg=name)
    for mine, theirs in zip(jax.tree.leaves(got.first), jax.tree.leaves(expected.first), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=0)
    for path, leaf in expected.last.trainable.items():
        np.testing.assert_allclose(got.last.trainable[path], leaf, atol=1e-5, rtol=0, err_msg=path)
    for mine, theirs in zip(got.counts, expected.counts, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in ("gpt_oss", "glm4_moe") else pytest.mark.long)
        for family in FAMILIES
        if family != "mixtral"
    ],
)
def test_so_it_is_in_other_families(family: str):
    """Heads of one norm lie on several devices, and bounds are reached."""
    sizes = {
        "clip_qkv": 0.05, "shared_hidden": 16, "embed_factor": 2.0, "residual_factor": 0.5, "logits_divisor": 2.0,
        "local": (True, False, True), "local_window": 5, "rope_scaling": YarnConfig(factor=8.0, length=16),
        "glu_limit": 0.02, "dense_hidden": 16, "shared_experts": 1, "rotary_share": 2 / 3, "groups": 2, "top_groups": 1,
    }  # fmt: skip
    own = {name: size for name, size in sizes.items() if name in FAMILIES[family].attributes.sizes.values()}
    decoder = dataclasses.replace(MODEL.decoder, family=family, **{**FAMILIES[family].fields, **own})
    model = dataclasses.replace(MODEL, decoder=decoder)
    mesh, arrays = sharded(MESHES["no data"], model)
    got = three_steps("full", arrays, [place_rows(batch, mesh) for batch in BATCHES], mesh, model)
    assert_same(got, three_steps("full", tiny.arrays(model), BATCHES, model=model))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["dinov2_with_registers", pytest.param("siglip", marks=pytest.mark.long)])
def test_so_it_is_behind_other_picture_towers(family: str):
    more: dict[str, Any] = {"registers": 3, "gated": True} if family == "dinov2_with_registers" else {}
    tower = dataclasses.replace(tiny.VISION, family=family, **TOWERS[family].fields, **more)
    model = with_vision(MODEL, tower)
    mesh, arrays = sharded(MESHES["no data"], model)
    got = three_steps("align", arrays, [place_rows(batch, mesh) for batch in BATCHES], mesh, model)
    assert_same(got, three_steps("align", tiny.arrays(model), BATCHES, model=model))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [MESHES["no tensor"], (4, 1, 1, 2)], ids=str)
def test_so_it_is_over_experts_in_four_bits(shape: tuple[int, ...]):
    """Read in shards, integers gathered over fsdp; groups of the hidden width on several devices. (Over fsdp, expert
    and tensor at once XLA's CPU client waits for ever, now and then: its devices begin with other messages.)"""
    model = dataclasses.replace(MODEL, expert_storage="int4", expert_group=4)
    leaves = quantising.stored(folders.source_of(MODEL).leaves, model.quantised)
    mesh, alone = make_mesh(dict(zip(MESH_AXES, shape, strict=True))), one_device()
    arrays, whole = (
        read_sharded(leaves, parameter_shardings(tiny.structure(model), place), dtype="float32")
        for place in (mesh, alone)
    )
    got = three_steps("finetune", arrays, [place_rows(batch, mesh) for batch in BATCHES], mesh, model)
    expected = three_steps("finetune", whole, BATCHES, model=model)
    assert_same(got, expected)
    plain = on_one_device("finetune").losses[0]["ce"]  # of the weights as they are
    assert abs(expected.losses[0]["ce"] - plain) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "shape", "rows", "length"),
    [("full, text", (1, 2, 2, 2), 4, 14), ("finetune", (1, 2, 2, 2), 8, 13)],
)
def test_positions_that_do_not_divide_go_to_every_device(stage: str, shape, rows: int, length: int):
    run, split = value_and_gradient(stage)
    batch = tiny.batch(rows=rows, length=length)
    expected = run(*split(tiny.arrays(MODEL)), batch)
    mesh, arrays = sharded(shape)
    with jax.set_mesh(mesh):
        got = run(*split(arrays), place_rows(batch, mesh))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    for path, gradient in expected[1].items():
        np.testing.assert_allclose(got[1][path], gradient, atol=1e-5, rtol=0, err_msg=path)


def test_items_that_fill_up_a_tower_s_work_change_nothing():
    """4 rows of 3 pictures are 3 for each 4th of 8 devices, which both of its devices compute, or with an empty one in
    each row 2 for each device."""
    batch = tiny.batch(rows=4, pixels=True)
    batch = batch._replace(media={"image": np.repeat(np.asarray(batch.media["image"]), 3, axis=1)})
    assert batch.media["image"].shape[:2] == (4, 3)
    structure, given = tiny.structure(MODEL), tiny.arrays(MODEL)
    embed = jax.jit(lambda arrays, batch: with_arrays(structure, arrays).embed(batch))
    expected = embed(given, batch)
    mesh, arrays = sharded((2, 2, 1, 2))
    with jax.set_mesh(mesh):
        assert items_to_add(*batch.media["image"].shape[:2]) == 1
        got = embed(arrays, place_rows(batch, mesh))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_mesh_that_does_not_fit_is_refused():
    with pytest.raises(MoextendError, match="does not cover 8 devices: the product of its sizes must be 8"):
        make_mesh({"data": 3, "fsdp": 1, "expert": 1, "tensor": 1})


@functools.cache
def finetune_on_one_device() -> Any:
    run, split = value_and_gradient("finetune")
    return jax.tree.map(np.asarray, run(*split(tiny.arrays(MODEL)), tiny.batch(rows=8)))


@pytest.mark.parametrize(
    "shape", ["no data", *(pytest.param(name, marks=pytest.mark.long) for name in ("no tensor", "expert"))]
)
def test_exchanged_rows_give_what_gathered_tokens_give(shape: str):
    """The emulation on CPU of `ragged_all_to_all`, in value and gradient."""
    expected = finetune_on_one_device()
    run, split = value_and_gradient("finetune", tiny.structure(dataclasses.replace(MODEL, dispatch="exchange")))
    mesh, arrays = sharded(MESHES[shape])
    with jax.set_mesh(mesh):
        got = run(*split(arrays), place_rows(tiny.batch(rows=8), mesh))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    for path, gradient in expected[1].items():
        np.testing.assert_allclose(got[1][path], gradient, atol=1e-5, rtol=0, err_msg=path)


# --- several extensions -----------------------------------------------------------------------------------------------

SEVERAL = dataclasses.replace(tiny.BOTH, decoder=MODEL.decoder, text_isolation="strict")
TALKS = tiny.talks(
    *([tiny.Talk(n, media)] for n, media in enumerate((("image",), ("sound",), ("image", "sound"), ()) * 2)), length=14
)


def second_extension(dispatch: Any, shape: tuple[int, ...] | None = None) -> Any:
    """Loss and gradient of the second extension, beside the first, which is frozen."""
    structure, arrays, batch = tiny.structure(SEVERAL), tiny.arrays(SEVERAL), TALKS
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True))) if shape else one_device()
    if shape:
        shardings = parameter_shardings(structure, mesh)
        arrays = {path: jax.device_put(leaf, shardings[path]) for path, leaf in arrays.items()}
        batch = place_rows(batch, mesh)
    trainable, frozen = stages.split(arrays, ["extensions/sound/*"])
    config = dataclasses.replace(SEVERAL, dispatch=dispatch)
    run, _ = value_and_gradient("", stages.for_training(tiny.structure(config), trainable))
    with jax.set_mesh(mesh):
        return jax.tree.map(np.asarray, run(trainable, frozen, batch))


@functools.cache
def second_extension_on_one_device() -> Any:
    return second_extension("gather")


@pytest.mark.parametrize("dispatch", few(["exchange", "gather"]))
def test_several_extensions_do_not_depend_on_the_mesh(dispatch: str):
    expected, got = second_extension_on_one_device(), second_extension(dispatch, MESHES["no data"])
    np.testing.assert_allclose(got[0], expected[0], atol=1e-5)
    for path, gradient in expected[1].items():
        assert gradient.any(), path
        np.testing.assert_allclose(got[1][path], gradient, atol=1e-5, rtol=0, err_msg=path)
