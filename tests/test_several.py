"""Several extensions in one model: none changes what belongs to another's medium, frozen ones are read where they lie,
shares and compositions take them out and in, and answers follow each row's media."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_asking
import tiny
from folders import assert_same
from jax.extend.core import jaxprs_in_params
from tiny import Talk, talks

from moextend_jax.config import RECIPES, Batch, ModelConfig, Named, with_extension
from moextend_jax.data.conversations import MEDIUM
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.prompts import Prompt, prompt_batch, rooms_of_prompts
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import shares, shares_of_text
from moextend_jax.parameters import with_arrays
from moextend_jax.settings import OptimizerConfig
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import make_optimizer
from moextend_jax.train.step import init_state, make_step, summed

STRICT = dataclasses.replace(tiny.BOTH, text_isolation="strict")
ALONE = {"image": with_extension(STRICT, None, name="sound"), "sound": with_extension(STRICT, None, name="image")}
BASE = with_extension(ALONE["image"], None, name="image")
IMAGE, SOUND, TEXT, EACH = Talk(1, ("image",)), Talk(2, ("sound",)), Talk(3), Talk(4, ("image", "sound"))
E = tiny.DECODER.experts


def leaves_of(config: ModelConfig, **more: Any) -> dict[str, jax.Array]:
    """Those of the model with both, as far as a model of these sizes has them."""
    own = tiny.arrays(config, **more)
    assert own.keys() <= tiny.arrays(tiny.BOTH, **more).keys()
    return own


@functools.cache
def decoded(config: ModelConfig, std: float = 0.3):
    model = tiny.structure(config)
    run = jax.jit(lambda arrays, batch: with_arrays(model, arrays)(batch)[:2])
    return lambda batch: jax.tree.map(np.asarray, run(leaves_of(config, std=std), batch))


def gradient(config: ModelConfig, batch: Batch, *, of: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Of the losses, for leaves whose paths start so; the structure is that of a step which trains them."""
    arrays = leaves_of(config)
    trainable = {path: leaf for path, leaf in arrays.items() if path.startswith(of)}
    frozen = {path: leaf for path, leaf in arrays.items() if path not in trainable}
    model = stages.for_training(tiny.structure(config), trainable)

    @jax.jit
    def run(trainable, frozen, batch):
        def total(trainable):
            whole = with_arrays(model, {**trainable, **frozen})
            return losses(whole, batch, recipe=RECIPES["paper"], aux_coefficient=0.01, chunk=5)[0].total

        return jax.grad(total)(trainable)

    return jax.tree.map(np.asarray, run(trainable, frozen, batch))


# --- isolation --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "talk"), [("sound", SOUND), ("image", IMAGE)])
def test_a_batch_of_one_medium_is_that_of_its_extension_alone(name: str, talk: Talk):
    batch = talks([talk, TEXT], [talk._replace(number=8)], [TEXT._replace(number=9)])
    (hidden_BLD, routing), (alone_BLD, alone) = decoded(STRICT)(batch), decoded(ALONE[name])(batch)
    assert hidden_BLD.tobytes() == alone_BLD.tobytes()
    own = [*range(E), *tiny.BOTH.columns(name)]
    assert routing.logits_TO[..., own].tobytes() == alone.logits_TO.tobytes()
    assert np.isneginf(np.delete(routing.logits_TO, own, axis=-1)).all()
    np.testing.assert_array_equal(routing.ids_Tk, np.array(own)[alone.ids_Tk])
    assert routing.weights_Tk.tobytes() == alone.weights_Tk.tobytes()
    assert (alone.ids_Tk >= E).any()
    trained = (f"extensions/{name}/", "media/", "decoder/embed")
    slope = gradient(STRICT, batch, of=trained)
    assert_same(slope, gradient(ALONE[name], batch, of=trained))
    assert all(leaf.any() for path, leaf in slope.items() if path.startswith(trained[0]))


def test_a_batch_of_text_is_the_base_s():
    batch = talks([TEXT, Talk(9)], [Talk(10)])
    (hidden_BLD, routing), (base_BLD, base) = decoded(STRICT)(batch), decoded(BASE)(batch)
    assert hidden_BLD.tobytes() == base_BLD.tobytes()
    assert routing.logits_TO[..., :E].tobytes() == base.logits_TO.tobytes()
    assert np.isneginf(routing.logits_TO[..., E:]).all()
    np.testing.assert_array_equal(routing.ids_Tk, base.ids_Tk)
    slope = gradient(STRICT, batch, of=("extensions/", "decoder/embed"))
    assert not any(slope.pop(path).any() for path in list(slope) if path.startswith("extensions/"))
    assert_same(slope, gradient(BASE, batch, of=("decoder/embed",)))


def test_conversations_of_all_media_in_a_batch_are_each_as_alone():
    rows = ([IMAGE, TEXT], [SOUND, Talk(5, ("image",))], [EACH], [Talk(6), Talk(7, ("sound",))])
    batch = talks(*rows, length=24)
    of = decoded(STRICT, 0.2)  # larger arrays make a hidden state out of small differences, roundings and all
    hidden_BLD, routing = of(batch)
    logits_ZBLO = routing.logits_TO.reshape(tiny.DECODER.layers, *batch.ids_BL.shape, -1)
    for b, row in enumerate(rows):
        for segment, talk in enumerate(row, 1):
            here = batch.segments_BL[b] == segment
            alone = talks([talk], length=24)
            alone_BLD, alone_routing = of(alone)
            there = alone.segments_BL[0] == 1
            np.testing.assert_allclose(hidden_BLD[b, here], alone_BLD[0, there], atol=1e-5, rtol=0, err_msg=str(talk))
            np.testing.assert_allclose(logits_ZBLO[:, b, here], alone_routing.logits_TO[:, there], atol=1e-5, rtol=0)


# --- where extensions lie ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "remat"),
    [(2, "layer"), (1, "none"), (1, "layer"), (2, "none")],
)
def test_a_gradient_that_is_added_up_in_place_is_the_gradient(parts: int, remat: Any):
    """Of two extensions of different layers: what jax.grad gives of each part, summed."""
    config = dataclasses.replace(tiny.BOTH, remat=remat)
    model, arrays = tiny.structure(config), leaves_of(tiny.BOTH)
    trained, frozen = stages.split(arrays, ["extensions/*", "media/*/projector/*", "decoder/layers/moe/gate"])
    batches = [talks([EACH], [IMAGE, TEXT]), talks([SOUND, TEXT], [EACH])][:parts]

    def loss(trained, batch):
        hidden_BLD, routing, *_ = with_arrays(model, {**frozen, **trained})(batch)
        return jnp.sin(hidden_BLD).sum() + (routing.weights_Tk**2).sum(), hidden_BLD

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    ours, hidden_BLD = jax.jit(lambda trained, parts: summed(loss, trained, parts, lambda leaves: leaves))(
        trained, stacked
    )
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    theirs = [gradient(trained, batch) for batch in batches]
    np.testing.assert_allclose(hidden_BLD, sum(hidden for _, hidden in theirs), atol=1e-5, rtol=0)
    for path in trained:
        leaf = sum(np.asarray(slopes[path]) for slopes, _ in theirs)
        size = float(np.abs(leaf).max())
        assert size > 0, path
        np.testing.assert_allclose(ours[path], leaf, atol=2e-6 * size, rtol=0, err_msg=path)


def shapes_of(jaxpr) -> Iterator[tuple[int, ...]]:
    """Of all arrays that a program computes, in the programs inside it too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.shape for out in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_a_step_holds_no_extension_for_every_layer():
    """Z = 3 times its part of one layer would be that: as an input of the scan, as what its forward pass keeps, or as a
    gradient."""
    model = tiny.structure(dataclasses.replace(tiny.BOTH, remat="layer"))
    arrays = tiny.arrays(tiny.BOTH)
    trainable, frozen = stages.split(arrays, ["extensions/sound/*"])
    optimizer = make_optimizer(OptimizerConfig(), paths=trainable)
    step = make_step(
        model, optimizer=optimizer, schedule=lambda _: 1e-3, recipe=RECIPES["paper"], aux_coefficient=0.01, loss_chunk=5
    )
    traced = tiny.traced(step, init_state(trainable, optimizer), frozen, talks([EACH], [IMAGE, TEXT]))
    computed = set(shapes_of(traced.jaxpr.jaxpr))

    def of_layers(name: str) -> set[tuple[int, ...]]:
        leaves = [leaf for path, leaf in arrays.items() if path.startswith(f"extensions/{name}/")]
        return {(tiny.DECODER.layers, *leaf.shape[1:]) for leaf in leaves}

    assert {leaf.shape for leaf in trainable.values()} <= computed
    assert not (of_layers("image") | of_layers("sound")) & computed


# --- composition ------------------------------------------------------------------------------------------------------

CLOSED = -np.inf


@pytest.mark.parametrize("isolation", ["strict", "none"])
def test_who_may_choose_what_decoupled(isolation: Any):
    """Tokens of a span its own extension; the text around it none, or all by their shares."""
    added = {"image": 0.25, "sound": 1.0}
    extensions = {name: dataclasses.replace(tiny.BOTH.extensions[name], share=share) for name, share in added.items()}
    config = dataclasses.replace(
        tiny.BOTH, composition="decoupled", text_isolation=isolation, extensions=Named(extensions)
    )
    batch = talks([EACH], [TEXT])
    open_to = shares(batch, config)
    assert list(open_to) == ["image", "sound"]
    for name, share in added.items():
        of_text = CLOSED if isolation == "strict" else np.log(share)
        expected = np.where(batch.places_BL < 0, of_text, CLOSED)
        here = (batch.places_BL < 4) if name == "image" else (batch.places_BL >= 4)
        expected[here & (batch.places_BL >= 0)] = 0
        np.testing.assert_allclose(np.asarray(open_to[name]), expected, rtol=1e-6)
        behind = shares_of_text(batch, config)[name]
        assert behind is not None
        np.testing.assert_allclose(behind, [of_text] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "isolation", "composition"),
    [("image", "none", "shared"), ("sound", "strict", "decoupled"), ("sound", "none", "decoupled")],
)
def test_a_share_of_nothing_takes_an_extension_out_exactly(name: str, isolation: Any, composition: Any):
    def under(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, text_isolation=isolation, composition=composition)

    extensions = {
        other: dataclasses.replace(own, share=float(other == name)) for other, own in tiny.BOTH.extensions.items()
    }
    without = under(dataclasses.replace(tiny.BOTH, extensions=Named(extensions)))
    batch = talks([EACH], [IMAGE, TEXT], [SOUND])
    (hidden_BLD, routing), (alone_BLD, alone) = decoded(without)(batch), decoded(under(ALONE[name]))(batch)
    assert hidden_BLD.tobytes() == alone_BLD.tobytes()
    own = [*range(E), *tiny.BOTH.columns(name)]
    np.testing.assert_array_equal(routing.ids_Tk, np.array(own)[alone.ids_Tk])
    assert (routing.ids_Tk >= E).any()


@pytest.mark.parametrize("isolation", ["strict", "none"])
def test_decoupled_spans_are_routed_as_by_their_own_extension(isolation: Any):
    """Router inputs of the first layer do not depend on any extension, those of the span's tokens least of all."""
    config = dataclasses.replace(tiny.BOTH, composition="decoupled", text_isolation=isolation)
    batch = talks([EACH], [SOUND, TEXT])
    _, routing = decoded(config)(batch)
    places_T = batch.places_BL.reshape(-1)
    first_TO, second_TO, third_TO = np.isfinite(routing.logits_TO)
    image, sound = list(tiny.BOTH.columns("image")), list(tiny.BOTH.columns("sound"))
    of_image_T, of_sound_T = (places_T >= 0) & (places_T < 4), places_T >= 4
    text_T = (places_T < 0) & (isolation == "none")
    assert (third_TO[:, image].all(axis=1) == (of_image_T | text_T)).all()
    assert (third_TO[:, sound].all(axis=1) == (of_sound_T | text_T)).all()
    assert not first_TO[:, sound].any() and not second_TO[:, image].any()  # layers that do not have them
    assert first_TO[of_image_T][:, image].all() and second_TO[of_sound_T][:, sound].all()
    chosen_Tk = routing.ids_Tk[2]
    assert np.isin(chosen_Tk[of_image_T], [*range(E), *image]).all() and np.isin(chosen_Tk, image).any()
    assert np.isin(chosen_Tk[of_sound_T], [*range(E), *sound]).all() and np.isin(chosen_Tk, sound).any()


# --- answers ----------------------------------------------------------------------------------------------------------

EOS = test_asking.EOS


class Reader:
    """Features of nine items of a medium."""

    field = "features"

    def __init__(self, name: str):
        self.medium = tiny.BOTH.media[name]
        rng = np.random.default_rng(len(name))
        self.of = rng.normal(size=(9, self.medium.tokens, self.medium.tower.sizes()["C"])).astype(np.float32)

    def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
        return np.where((rows_BM >= 0)[..., None, None], self.of[np.maximum(rows_BM, 0)], 0)


READERS = {name: Reader(name) for name in tiny.BOTH.media}
HEADS: tuple[tuple[str, ...], ...] = (("sound",), ("image", "sound"), ())


def prompts(count: int = 12) -> list[Prompt]:
    """Heads of every kind in turn; tails of up to 8 tokens. Places count a row's media by number: `in_row`."""
    rng, result = np.random.default_rng(3), []
    for n in range(count):
        media = HEADS[n % len(HEADS)]
        head = [int(id) for id in rng.integers(10, 60, 2)] if media else []
        places = [-1] * len(head)
        for name in media:
            number, tokens = list(tiny.BOTH.media).index(name), READERS[name].medium.tokens
            head += [3] * tokens + [6]
            places += [number * MEDIUM + token for token in range(tokens)] + [-1]
        tail = rng.integers(10, tiny.DECODER.vocab_size, 1 + n % 8)
        result.append(
            Prompt(
                ids_L=np.array([*head, *tail], np.int32), places_L=np.array([*places, *[-1] * len(tail)], np.int32),
                head=len(head), items={name: (n % 9,) for name in media},
            )
        )  # fmt: skip
    return result


def lively(config: ModelConfig) -> dict[str, jax.Array]:
    arrays = leaves_of(config)
    return arrays | {"decoder/embed": arrays["decoder/embed"] * 2}


@functools.cache
def generator(config: ModelConfig) -> Generator:
    return Generator(tiny.structure(config), eos=EOS)


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


def in_a_batch(config: ModelConfig, some: list[Prompt]) -> list[list[int]]:
    """Answers to whole prompts, side by side whatever their media, none read apart."""
    rooms = rooms_of_prompts(some, READERS)
    rows = dict(enumerate(some))
    batch = prompt_batch(rows, readers=READERS, rooms=rooms, media=tuple(READERS), rows=16, length=24)
    ids_BL = tiny.complete(generator(config), lively(config), batch, max_new_tokens=test_asking.NEW)
    return [until_end(ids_L.tolist()) for ids_L in ids_BL[: len(some)]]


def asked(config: ModelConfig, some: list[Prompt]) -> list[list[int]]:
    """In batches of like media, whose heads are read first."""
    who = Asker(
        generator=generator(config), arrays=lively(config), ends=(EOS,), rows=16, tokens=10**6,
        media=tuple(READERS), readers=READERS,
    )  # fmt: skip
    return test_asking.said(who, some)


@pytest.mark.slow
def test_answers_behind_heads_choose_by_the_media_of_their_row():
    some = prompts()
    answers = asked(STRICT, some)
    assert answers == in_a_batch(STRICT, some)
    base = in_a_batch(BASE, some)
    blind, seeing = ([n for n, prompt in enumerate(some) if bool(prompt.items) == seen] for seen in (False, True))
    assert [answers[n] for n in blind] == [base[n] for n in blind]
    assert all(tuple(some[n].items) for n in seeing) and [answers[n] for n in seeing] != [base[n] for n in seeing]


@pytest.mark.slow
def test_answers_of_decoupled_extensions_are_those_of_each_row_alone():
    """Text isolation strict: what follows a picture is written by the base's experts alone."""
    config = dataclasses.replace(STRICT, composition="decoupled")
    some = prompts()
    together = in_a_batch(config, some)
    assert together != in_a_batch(STRICT, some)
    assert in_a_batch(config, some[:1]) == together[:1]
