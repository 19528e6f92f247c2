"""Blocks between the layers: silent at the start, passed by where closed, cached, sharded, trained, counted."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_run
import tiny
from flax import nnx

from moextend_jax.config import (
    RECIPES,
    BlocksConfig,
    DecoderConfig,
    ExtensionConfig,
    ModelConfig,
    MoextendError,
    Named,
    with_extension,
)
from moextend_jax.generate import Generator
from moextend_jax.models.blocks import SILENT, fresh_blocks
from moextend_jax.models.flops import step_flops
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import by_path, with_arrays
from moextend_jax.runs import results
from moextend_jax.runs.making import make, make_all
from moextend_jax.runs.models_of import frozen_unchanged, leaves_of, open_model
from moextend_jax.runs.run import open_run, remember
from moextend_jax.settings import MethodSettings
from moextend_jax.train.loss import losses
from moextend_jax.train.stages import group

FOUR = dataclasses.replace(tiny.DECODER, layers=4)
BLOCKS = dataclasses.replace(tiny.EXTENDED, decoder=FOUR, blocks=Named(own=BlocksConfig(count=2)))
"""Layers 0 1 | block | 2 3 | block, of which 0 and 2 are extended."""


def hidden(config: ModelConfig, arrays, batch) -> np.ndarray:
    own = {path: leaf for path, leaf in arrays.items() if path.split("/")[0] != "blocks" or config.blocks}
    return np.asarray(with_arrays(abstract(config), own)(batch).hidden_BLD)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "layer"])
def test_at_the_start_they_are_silent_and_what_silences_them_has_the_gradient(remat):
    config, batch = dataclasses.replace(BLOCKS, remat=remat), tiny.batch()
    arrays = tiny.arrays(config)
    arrays |= fresh_blocks(arrays, config=config, name="own")
    without = dataclasses.replace(config, blocks=Named())
    np.testing.assert_array_equal(hidden(config, arrays, batch), hidden(without, arrays, batch))
    assert config.blocks["own"].sources(FOUR) == (1, 3)
    path = "attention/query"
    np.testing.assert_array_equal(arrays[f"blocks/own/{path}"], arrays[f"decoder/layers/{path}"][jnp.array([1, 3])])
    _, gradient = tiny.loss_and_gradient(config, arrays, batch, of="blocks/", coefficient=0.0)
    moving = {path for path, leaf in gradient.items() if jnp.any(leaf)}
    assert moving == {f"blocks/own/{path}" for path in SILENT} & gradient.keys()


@pytest.mark.slow
def test_their_load_is_balanced_beside_experts_that_are_added_to_a_token_s_picks():
    """Layers have more picks of a token there than blocks."""
    added = ExtensionConfig(layers=(0, 2), sources=(1, 3), calibrator_width=5, start="added")
    config = dataclasses.replace(with_extension(tiny.PLAIN, added), blocks=Named(blocks=BlocksConfig(count=3)))
    model, batch = abstract(config), tiny.batch()
    made = with_arrays(model, tiny.arrays(config))
    found, _ = losses(made, batch, recipe=RECIPES["paper"], aux_coefficient=0.01, chunk=8)
    assert np.isfinite(found.total) and found.aux > 0


def test_what_blocks_are_closed_to_is_not_balanced():
    """Conversations of text under strict isolation; behind the block is no layer, whose load would tell of them."""
    config = dataclasses.replace(tiny.PLAIN, blocks=Named(own=BlocksConfig(count=1)), text_isolation="strict")
    arrays, batch = tiny.arrays(config), tiny.batch()
    text_B1 = (batch.places_BL < 0).all(axis=1, keepdims=True)
    other = batch._replace(ids_BL=np.where(text_B1, np.roll(batch.ids_BL, 3, axis=1), batch.ids_BL))
    gate = "blocks/own/moe/gate"
    before, after = (
        tiny.loss_and_gradient(config, arrays, rows._replace(labels_BL=np.full_like(rows.labels_BL, -100)), of=gate)[1]
        for rows in (batch, other)
    )
    assert text_B1.any() and not text_B1.all() and np.any(before[gate])
    np.testing.assert_array_equal(before[gate], after[gate])


@pytest.mark.slow
def test_each_stands_behind_its_group():
    """As a plain model of six layers whose third and sixth are the blocks; the balance loss counts them too."""
    config = dataclasses.replace(BLOCKS, extensions=Named())
    arrays, batch = tiny.arrays(config), tiny.batch()
    deeper = dataclasses.replace(config, decoder=dataclasses.replace(FOUR, layers=6), blocks=Named())
    plain = {path: leaf for path, leaf in arrays.items() if not path.startswith("blocks/")}
    for path, leaf in plain.items():
        if path.startswith("decoder/layers/"):
            block = arrays[path.replace("decoder/layers/", "blocks/own/")]
            plain[path] = jnp.concatenate([leaf[:2], block[:1], leaf[2:], block[1:]])
    np.testing.assert_allclose(hidden(config, arrays, batch), hidden(deeper, plain, batch), atol=1e-5)
    models = ((config, arrays), (deeper, plain))
    found, expected = (tiny.loss_and_gradient(*model, batch, of="media/")[0] for model in models)
    np.testing.assert_allclose((found.total, found.aux), (expected.total, expected.aux), rtol=1e-5)


@pytest.mark.slow
def test_conversations_that_they_are_closed_to_pass_by():
    """Even rows have a picture; a batch of text alone runs the program of before."""
    config = dataclasses.replace(BLOCKS, text_isolation="strict")
    arrays, batch = tiny.arrays(config), tiny.batch()
    closed = dataclasses.replace(config, blocks=Named(own=BlocksConfig(count=2, share=0.0)))
    with_them, without = (hidden(c, arrays, batch) for c in (config, closed))
    pictured_BL = np.broadcast_to((batch.places_BL >= 0).any(axis=1, keepdims=True), batch.ids_BL.shape)
    np.testing.assert_array_equal(with_them[~pictured_BL], without[~pictured_BL])
    assert np.abs(with_them - without)[pictured_BL].max() > 1e-2
    text = batch._replace(features={}, places_BL=np.full_like(batch.places_BL, -1))
    np.testing.assert_array_equal(
        hidden(config, arrays, text), hidden(dataclasses.replace(config, blocks=Named()), arrays, text)
    )
    half = dataclasses.replace(config, blocks=Named(own=BlocksConfig(count=2, share=0.5)))
    assert np.abs(hidden(half, arrays, batch) - with_them)[pictured_BL].max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["none", "strict"])
def test_a_cached_answer_is_the_whole_model_s(isolation):
    """The first token comes of the prompt, the others of what is kept; the last row is text."""
    config = dataclasses.replace(BLOCKS, text_isolation=isolation)
    arrays, batch = tiny.arrays(config), tiny.batch(rows=2)
    answer_BL = tiny.complete(Generator(abstract(config), eos=-1), arrays, batch, max_new_tokens=4)
    whole = with_arrays(abstract(config), arrays)
    for row, ids in enumerate(answer_BL):
        alone = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], batch)
        length = int((alone.segments_BL > 0).sum())
        ids_BL = np.concatenate([alone.ids_BL[:, :length], ids[None]], axis=1)
        places_BL = np.pad(alone.places_BL[:, :length], ((0, 0), (0, len(ids))), constant_values=-1)
        ones_BL, places = np.ones_like(ids_BL), np.arange(ids_BL.shape[1], dtype=np.int32)[None]
        longer = alone._replace(
            ids_BL=ids_BL, labels_BL=-100 * ones_BL, positions_BL=places, segments_BL=ones_BL, places_BL=places_BL
        )
        best_L = np.asarray(whole.decoder.logits(whole(longer).hidden_BLD)[0].argmax(axis=-1))
        np.testing.assert_array_equal(ids, best_L[length - 1 : -1])


@pytest.mark.slow
@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("dispatch", ["exchange", pytest.param("gather", marks=pytest.mark.long)])
def test_sharded_is_unsharded(dispatch):
    tiny.check_sharded_is_unsharded(dataclasses.replace(BLOCKS, dispatch=dispatch), of="blocks/")


@pytest.mark.slow
def test_a_run_with_blocks(tmp_path, monkeypatch):
    tiny.shorten_easy_vqa(monkeypatch)
    method = MethodSettings(name="blocks", blocks=3)
    settings = random_run.settings(tiny.write_base(tmp_path / "base"), method=method)
    stage = dataclasses.replace(settings.finetune, steps=3)  # in the first the rate is still zero
    run = open_run(dataclasses.replace(settings, finetune=stage), tmp_path / "work")
    assert [*results.table(run.settings).results] == ["align", "grow", "finetune", "full"]
    assert results.table(run.settings).model("moextend").title == "LLaMA-Pro"
    for name in ("align", "grow", "finetune"):
        make(run, name)
    remember(run)
    grown, tuned = (leaves_of(run, name) for name in ("grow", "finetune"))
    assert grown.keys() == tuned.keys() and all(path.startswith("blocks/image/") for path in grown)
    down = "blocks/image/moe/experts/w_down"
    assert not jnp.any(grown[down]) and jnp.any(tuned[down])
    assert frozen_unchanged(run)
    assert open_model(run, "moextend").model.config.blocks["image"].count == 3
    method = dataclasses.replace(method, blocks=2)
    with pytest.raises(MoextendError, match=r"method.blocks = 2: the 3 layers .* cannot be cut .* 1, 3 would do"):
        list(make_all(dataclasses.replace(run, settings=dataclasses.replace(run.settings, method=method))))


@pytest.mark.parametrize(("count", "parameters", "more"), [(2, 2_902_540_288, 6.2), (4, 5_805_080_576, 12.4)])
def test_parameters_and_flops_of_the_full_size(count: int, parameters: int, more: float):
    config = ModelConfig(decoder=DecoderConfig(), blocks=Named(a=BlocksConfig(count=count, medium="")))
    shapes = {p: leaf.shape for p, leaf in by_path(nnx.state(abstract(config))).items() if p.startswith("blocks/")}
    assert sum(map(math.prod, shapes.values())) == parameters
    assert {group(path) for path in shapes} == {"blocks"}
    flops = step_flops(config, trains=("blocks/*",), rows=1, length=2, items={}).parts
    forward = {part: phases["forward"] for part, phases in flops.items() if "scores" not in part}
    added = sum(flops for part, flops in forward.items() if part.endswith(" of blocks a"))
    assert 100 * added / (sum(forward.values()) - added) == pytest.approx(more, abs=0.05)
