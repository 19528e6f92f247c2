"""Every number that ../shared/oracle holds of the released PyTorch code equals ours."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moextend_jax.config import IGNORE, RECIPES, Batch, ExtensionConfig
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow
from moextend_jax.generate import Generator
from moextend_jax.models.parameters import with_arrays
from moextend_jax.train import stages
from moextend_jax.train.loss import aux_released, load, losses, losses_of
from moextend_jax.train.optimizer import OptimizerConfig, make_optimizer
from moextend_jax.train.step import init_state, make_step

pytestmark = [oracle.needs_oracle, pytest.mark.smoke]

SIMPLE, COMPOSED = 1e-5, 1e-4
RELEASED = RECIPES["released"]
TIED = "moextend_init"
"""Here a copied router column ties with its source, and rounding decides the top-2."""

CASES = [(model, batch) for model in oracle.MODELS for batch in ("train0", "text", "left")]


@functools.cache
def forward(name: str):
    """Jitted (arrays, batch) -> everything a forward pass gives."""
    model = oracle.load(name).model

    def run(arrays, batch: Batch):
        whole = with_arrays(model, arrays)
        decoded = whole(batch)
        losses_ = losses_of(
            decoded, whole, batch, recipe=RELEASED, aux_coefficient=oracle.COEFFICIENT, chunk=5
        )  # fmt: skip
        nomask = load(decoded.routing, jnp.ones(batch.ids_BL.size, bool))
        return {
            "embedded": whole.embed(batch),
            "hidden": decoded.hidden_BLD,
            "logits": whole.decoder.logits(decoded.hidden_BLD),
            "routing": decoded.routing,
            "losses": losses_,
            "aux_nomask": aux_released(nomask, config=whole.config),
        }

    return jax.jit(run)


@functools.cache
def ours(name: str, batch: str):
    rows = oracle.batch(batch, images=0 if name == "vision" else 1)  # one compiled program for most batches
    return jax.tree.map(np.asarray, forward(name)(oracle.load(name).arrays, rows))


def theirs(name: str, batch: str) -> dict[str, np.ndarray]:
    arrays = oracle.reference(f"forward_{name}")
    some = {key.removeprefix(batch + "/"): value for key, value in arrays.items() if key.startswith(batch + "/")}
    if not some:
        pytest.skip(f"the oracle has no {batch} for {name}")
    return some


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_logits(name: str, batch: str):
    expected = theirs(name, batch)
    if "logits" not in expected:
        pytest.skip("the oracle keeps no logits for it")
    real_BL = oracle.batch(batch).segments_BL > 0
    logits_BLV = ours(name, batch)["logits"]
    np.testing.assert_allclose(logits_BLV[real_BL], expected["logits"][real_BL], atol=COMPOSED, rtol=0)
    if batch != "left":  # on right padding the reference code's logits are reproduced too
        np.testing.assert_allclose(logits_BLV, expected["logits"], atol=COMPOSED, rtol=0)


@pytest.mark.parametrize(("name", "batch"), [case for case in CASES if case[1] != "left"])
def test_losses(name: str, batch: str):
    expected, got = theirs(name, batch), ours(name, batch)
    np.testing.assert_allclose(got["losses"].ce, expected["loss_ce"], atol=SIMPLE)
    np.testing.assert_allclose(got["losses"].aux, expected["loss_aux"], atol=SIMPLE)
    np.testing.assert_allclose(got["losses"].total, expected["loss_total"], atol=SIMPLE)
    if "loss_aux_nomask" in expected and not name.startswith("moextend"):  # the released extended form gives 0 there
        np.testing.assert_allclose(got["aux_nomask"], expected["loss_aux_nomask"], atol=SIMPLE)


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_routing(name: str, batch: str):
    expected, routing_ = theirs(name, batch), ours(name, batch)["routing"]
    config = oracle.load(name).config
    real_T = (oracle.batch(batch).segments_BL > 0).reshape(-1)
    if batch == "text" or batch == "train0":
        real_T[:] = True
    extended = config.extension.layers if config.extension else ()
    for layer in range(config.decoder.layers):
        logits_TO = expected[f"router_logits/{layer}"]
        assert logits_TO.shape[1] == 8 + (layer in extended)
        mine_TO = routing_.logits_TO[layer]
        np.testing.assert_allclose(mine_TO[real_T, : logits_TO.shape[1]], logits_TO[real_T], atol=COMPOSED, rtol=0)
        assert np.isneginf(mine_TO[:, logits_TO.shape[1] :]).all()
        if name == TIED:
            continue
        np.testing.assert_array_equal(routing_.ids_Tk[layer][real_T], expected[f"topk_idx/{layer}"][real_T])
        np.testing.assert_allclose(
            routing_.weights_Tk[layer][real_T], expected[f"topk_weight/{layer}"][real_T], atol=COMPOSED, rtol=0
        )


def test_hidden_states_after_the_splice_and_at_the_end():
    expected, got = theirs("moextend_pert", "train0"), ours("moextend_pert", "train0")
    np.testing.assert_allclose(got["embedded"], expected["hidden_states/0"], atol=SIMPLE, rtol=0)
    np.testing.assert_allclose(got["hidden"], expected["hidden_states/4"], atol=COMPOSED, rtol=0)


@pytest.mark.parametrize("name", ["vision", "moextend_pert"])
def test_image_features_and_splice_from_pixels_and_from_cached_features(name: str):
    expected = theirs(name, "train0")
    model, arrays, _ = oracle.load(name)
    whole = with_arrays(model, arrays)
    assert whole.vision is not None and whole.projector is not None
    batch = oracle.batch("train0")
    features_nPC = np.asarray(whole.vision(jnp.asarray(expected["pixel_values"].transpose(0, 2, 3, 1))))
    np.testing.assert_allclose(features_nPC, expected["clip_patch_features"], atol=SIMPLE, rtol=0)
    np.testing.assert_allclose(
        whole.projector(jnp.asarray(features_nPC)), expected["image_features"], atol=SIMPLE, rtol=0
    )

    B, M = batch.images_BMhwc.shape[:2]
    features_BMPC = np.zeros((B, M, *features_nPC.shape[1:]), np.float32)
    seen = dict.fromkeys(range(B), 0)
    for features_PC, (row, start, end) in zip(expected["clip_patch_features"], expected["img_pos"], strict=True):
        features_BMPC[row, seen[row]] = features_PC
        np.testing.assert_array_equal(
            np.flatnonzero(batch.patches_BL[row] // oracle.PATCHES == seen[row]), np.arange(start + 1, end)
        )
        seen[row] += 1
    cached = batch._replace(images_BMhwc=None, features_BMPC=features_BMPC)
    x_BLD = np.asarray(whole.embed(cached))
    np.testing.assert_allclose(x_BLD, ours(name, "train0")["embedded"], atol=SIMPLE, rtol=0)
    for n, (row, start, end) in enumerate(expected["img_pos"]):
        np.testing.assert_allclose(x_BLD[row, start + 1 : end], expected["image_features"][n], atol=SIMPLE, rtol=0)
    logits_BLV = forward(name)(arrays, cached)["logits"]
    np.testing.assert_allclose(logits_BLV, expected["logits"], atol=COMPOSED, rtol=0)


def test_plain_transformers_mixtral_on_text():
    expected, got = oracle.reference("hf_mixtral_text"), ours("vision", "text")
    np.testing.assert_allclose(got["logits"], expected["logits"], atol=COMPOSED, rtol=0)
    np.testing.assert_allclose(got["losses"].ce, expected["loss_ce"], atol=SIMPLE)
    np.testing.assert_allclose(got["losses"].aux, expected["loss_aux"], atol=SIMPLE)
    for layer in range(4):
        np.testing.assert_allclose(
            got["routing"].logits_TO[layer], expected[f"router_logits/{layer}"], atol=COMPOSED, rtol=0
        )


def total_of(model):
    def total(trainable, frozen, batch):
        whole = with_arrays(model, {**trainable, **frozen})
        return losses(whole, batch, recipe=RELEASED, aux_coefficient=oracle.COEFFICIENT, chunk=5)[0].total

    return total


def stage_reference(stage: str, name: str, prefix: str) -> dict[str, np.ndarray]:
    arrays = oracle.reference(f"stage_{stage}_{name.removeprefix('moextend_')}")
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


@pytest.mark.parametrize(
    ("stage", "name", "remat"),
    [
        ("align", "vision", "attention"),
        ("extend", "vision", "layer"),
        ("finetune", "moextend_pert", "none"),
        ("finetune", "moextend_pert", "layer"),
    ],
)
def test_gradients(stage: str, name: str, remat: str):
    model, arrays, config = oracle.load(name, remat=remat)
    trainable, frozen = stages.split(arrays, stages.patterns(stage, recipe=RELEASED))
    gradient = jax.jit(jax.grad(total_of(model)))(trainable, frozen, oracle.batch("train0"))
    oracle.assert_close_by_file_name(gradient, stage_reference(stage, name, "grad/"), config, atol=SIMPLE)


@pytest.mark.parametrize(
    ("stage", "name"),
    [("align", "vision"), ("extend", "vision"), ("finetune", "moextend_pert"), ("finetune", TIED)],
)
def test_losses_norms_and_parameters_of_three_steps(stage: str, name: str):
    model, arrays, config = oracle.load(name)
    trainable, frozen = stages.split(arrays, stages.patterns(stage, recipe=RELEASED))

    def schedule(_):
        return 1e-3

    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), paths=trainable)
    step = make_step(
        model,
        optimizer=optimizer,
        schedule=schedule,
        recipe=RELEASED,
        aux_coefficient=oracle.COEFFICIENT,
        loss_chunk=5,
    )
    expected = stage_reference(stage, name, "steps")[""]
    state = init_state({path: leaf.copy() for path, leaf in trainable.items()}, optimizer)
    for count in range(3):
        state, metrics = step(state, frozen, oracle.batch(f"train{count}"))
        got = [float(metrics[name]) for name in ("loss", "ce", "aux", "grad_norm")]
        if name == TIED:  # the losses of the first step do not depend on the tie; gradients and later steps do
            np.testing.assert_allclose(got[:3], expected[0, :3], atol=SIMPLE)
            return
        np.testing.assert_allclose(got, expected[count], atol=COMPOSED)
        if count == 0:
            oracle.assert_close_by_file_name(
                state.trainable, stage_reference(stage, name, "param1/"), config, atol=COMPOSED
            )
    oracle.assert_close_by_file_name(state.trainable, stage_reference(stage, name, "param3/"), config, atol=COMPOSED)


@pytest.mark.parametrize(("mode", "counted"), [("ascending", "least_likely"), ("top2", "top_k")])
def test_selection(mode: str, counted):
    expected = oracle.reference("selection")
    recipe = dataclasses.replace(RELEASED, counted_picks=counted)
    counts = []
    for name in ("vision", "vision_gate"):
        model, arrays, _ = oracle.load(name)
        counts.append(routing.count_all(model, arrays, _selection_rows(), recipe=recipe))
    np.testing.assert_array_equal(counts[0].total_ZO, expected[f"{mode}/counts_before"])
    np.testing.assert_array_equal(counts[1].total_ZO, expected[f"{mode}/counts_after"])
    chosen = routing.select(counts[0], counts[1], share=0.5, recipe=recipe)
    np.testing.assert_allclose(chosen.shift_Z, expected[f"{mode}/std"], atol=SIMPLE)
    order = np.argsort(expected[f"{mode}/selected_layers"])
    assert list(chosen.layers) == expected[f"{mode}/selected_layers"][order].tolist()
    assert list(chosen.sources) == expected[f"{mode}/expert_idxmax"][order].tolist()
    image_tokens = sum((batch.patches_BL >= 0).sum() for batch in _selection_rows())
    assert counts[0].image_tokens == image_tokens
    assert counts[0].text_tokens == expected["lengths"].sum() - image_tokens


def _selection_rows() -> list[Batch]:
    """All sequences in one batch: padding is not counted, and one row does not change another."""
    arrays, images = oracle.reference("selection"), oracle.reference("images")["selection/image_index"]
    ids_BL = np.maximum(arrays["input_ids"], 0)
    segments_BL = (np.arange(ids_BL.shape[1])[None] < arrays["lengths"][:, None]).astype(np.int32)
    has_BL = (ids_BL == oracle.START) & (segments_BL > 0)
    order = [int(np.atleast_1d(images[row])[0]) for row in range(len(ids_BL)) if has_BL[row].any()]
    halves = [slice(0, 7), slice(7, 14)]
    rows = oracle.with_images(ids_BL, np.full_like(ids_BL, IGNORE), segments_BL, order)
    return [jax.tree.map(lambda array, half=half: array[half], rows) for half in halves]


def test_growth_is_the_released_initialisation():
    _, arrays, config = oracle.load("vision_gate")
    extension = ExtensionConfig(layers=(1, 3), sources=(4, 3))
    grown = grow(arrays, config=dataclasses.replace(config, extension=extension), recipe=RELEASED, seed=0)
    init = oracle.load(TIED).arrays
    assert set(grown) == set(init) - set(arrays)
    for path, leaf in grown.items():
        if path.endswith("w_in"):  # random: as many, as wide
            assert leaf.shape == init[path].shape and 0.01 < np.std(leaf) < 0.03
        else:
            np.testing.assert_array_equal(leaf, init[path], err_msg=path)
    for path, leaf in arrays.items():
        np.testing.assert_array_equal(leaf, init[path], err_msg=path)


def test_greedy_generation_with_a_cache():
    expected = oracle.reference("generate")
    model, arrays, _ = oracle.load("moextend_pert")
    prompt = expected["prompt"]
    new = expected["tokens_cache"][0, prompt.shape[1] :].tolist()
    generator = Generator(model, eos=-1, suppress=tuple(range(oracle.START, 320)))
    image = _image_of(prompt)
    batch = oracle.with_images(prompt, np.full_like(prompt, IGNORE), np.ones_like(prompt), image)
    batch = jax.tree.map(jnp.asarray, batch)
    assert generator.complete(arrays, batch, max_new_tokens=len(new))[0].tolist() == new
    assert [int(ids_B[0]) for ids_B in generator.stream(arrays, batch, max_new_tokens=len(new))] == new

    def logits_of(ids_BL):
        rows = oracle.with_images(ids_BL, np.full_like(ids_BL, IGNORE), np.ones_like(ids_BL), image)
        return forward("moextend_pert")(arrays, rows)["logits"]

    whole = expected["tokens_nocache"][:, :-1]
    last = expected["logits_last"]
    assert last.shape[0] in (len(new), len(new) + 1)
    logits_LV = np.asarray(logits_of(whole))[0, prompt.shape[1] - 1 :]
    np.testing.assert_allclose(logits_LV, last[: len(logits_LV)], atol=COMPOSED, rtol=0)


def _image_of(prompt: np.ndarray) -> list[int]:
    """The picture of the prompt: the one whose path stands in bytes between the tags."""
    if not (prompt == oracle.START).any():
        return []
    start, end = (int(np.flatnonzero(prompt[0] == tag)[0]) for tag in (oracle.START, oracle.START + 1))
    path = bytes(int(piece) for piece in prompt[0, start + 1 : end] if piece != oracle.START + 2).decode()
    return [json.loads((oracle.FOLDER / "manifest.json").read_text())["images"].index(path)]
