"""Asking in batches says what asking one by one says, bit by bit, with few programs and each image read once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax.config import IGNORE, Batch
from moextend_jax.evaluate.asking import Asker
from moextend_jax.evaluate.prompts import Prompt, buckets, plan
from moextend_jax.generate import Generator
from moextend_jax.mesh import make_mesh
from moextend_jax.parameters import with_arrays
from moextend_jax.sharding import MESH_AXES

NEW, EOS = 5, 38
P = tiny.VISION.patches


class Pictures:
    """Features of nine images, and which of them were read."""

    field, medium = "features", tiny.EXTENDED.media["image"]

    def __init__(self):
        self.of = np.random.default_rng(5).normal(size=(9, P, tiny.VISION.width)).astype(np.float32)
        self.read_rows: list[int] = []

    def read(self, rows_BM: np.ndarray, /) -> np.ndarray:
        self.read_rows += rows_BM[rows_BM >= 0].tolist()
        return np.where((rows_BM >= 0)[..., None, None], self.of[np.maximum(rows_BM, 0)], 0)


@functools.cache
def arrays() -> dict[str, jax.Array]:
    made = tiny.arrays(tiny.EXTENDED)
    return made | {"decoder/embed": made["decoder/embed"] * 2}  # livelier answers


@functools.cache
def generator(eos: int = EOS) -> Generator:
    return on_mesh({"data": -1, "fsdp": 1, "expert": 1, "tensor": 1}, eos)


def on_mesh(sizes: dict[str, int], eos: int = EOS) -> Generator:
    return Generator(tiny.structure(tiny.EXTENDED), eos=eos, mesh=make_mesh(sizes))


def asker(*, rows: int = 16, tokens: int = 10**6, eos: int = EOS, mesh: dict[str, int] | None = None) -> Asker:
    return Asker(
        generator=generator(eos) if mesh is None else on_mesh(mesh, eos),
        arrays=arrays(), ends=(eos,), rows=rows, tokens=tokens, readers={"image": Pictures()},
    )  # fmt: skip


def prompts(count: int = 40, *, seed: int = 0) -> list[Prompt]:
    """Two of three with an image after two tokens; tails of 1 to 12 tokens."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(count):
        tail = rng.integers(10, tiny.DECODER.vocab_size, 1 + n % 12).astype(np.int32)
        if n % 3 == 2:
            made.append(Prompt(ids_L=tail, places_L=np.full(len(tail), -1, np.int32)))
            continue
        ids_L = np.concatenate([[7, 8], np.full(P, 3), [6], tail]).astype(np.int32)
        places_L = np.full(len(ids_L), -1, np.int32)
        places_L[2 : 2 + P] = np.arange(P)
        made.append(Prompt(ids_L=ids_L, places_L=places_L, head=3 + P, items={"image": (n % 9,)}))
    return made


def said(who: Asker, some: Sequence[Prompt], **options) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for batch in who.complete(some, max_new_tokens=NEW, **options):
        assert not found.keys() & {index for index, _ in batch}
        found |= dict(batch)
    return [found[n] for n in range(len(some))]


LONGEST = 24
"""Of the rows that are computed whole: one program for all of them."""


def whole(prompt: Prompt) -> Batch:
    """A row by itself, without a head apart."""
    rest = LONGEST - len(prompt.ids_L)
    labels_L = np.full(LONGEST, IGNORE, np.int32)
    if prompt.targets_L is not None:
        labels_L[prompt.head : len(prompt.ids_L)] = prompt.targets_L
    features_MPC = Pictures().of[list(prompt.items["image"])] if prompt.items else np.zeros_like(Pictures().of[:1])
    batch = Batch(
        np.pad(prompt.ids_L, (0, rest))[None],
        labels_L[None],
        np.arange(LONGEST, dtype=np.int32)[None],
        (np.arange(LONGEST) < len(prompt.ids_L)).astype(np.int32)[None],
        np.pad(prompt.places_L, (0, rest), constant_values=-1)[None],
        features={"image": features_MPC[None]},
    )
    return jax.tree.map(jnp.asarray, batch)


@functools.cache
def together() -> list[list[int]]:
    return said(asker(), prompts())


@pytest.mark.slow
def test_a_batch_says_what_each_prompt_says_alone_and_whole():
    lengths = {len(ids) for ids in together()}
    assert len(lengths) > 1 and len({tuple(ids) for ids in together()}) > 10  # worth comparing
    for n in (0, 1, 2, 17, 33):
        ids_L = tiny.complete(generator(), arrays(), whole(prompts()[n]), max_new_tokens=NEW)[0].tolist()
        assert (ids_L[: ids_L.index(EOS)] if EOS in ids_L else ids_L) == together()[n]


@pytest.mark.slow
def test_answers_do_not_depend_on_what_else_is_asked():
    some = prompts()
    order = np.random.default_rng(1).permutation(len(some)).tolist()
    assert said(asker(), [some[n] for n in order]) == [together()[n] for n in order]
    assert said(asker(), some[5:9]) == together()[5:9]
    assert said(asker(rows=8), some) == together()  # other shapes: equal here, where no two logits are as close


@pytest.mark.parametrize("with_heads", tiny.few([True, False]))
def test_logits_are_the_same_to_the_bit_wherever_a_row_stands(with_heads: bool):
    """All logits of two steps, of one prompt in every row of batches of other prompts. This is why an argmax cannot
    change: a prompt's shapes are its own (test_prompts.py), and within a shape rows do not matter."""
    every = [prompt for prompt in prompts(240) if bool(prompt.items) is with_heads]
    alike = [prompt for prompt in every if 8 < prompt.tail <= 12]
    who = asker()
    assert len({buckets(prompt) for prompt in alike}) == 1 and len(alike) > 16
    seen = []
    for turn in range(6):
        others = [alike[1 + n] for n in np.random.default_rng(turn).permutation(len(alike) - 1)[:15]]
        others.insert(3 * turn % 16, alike[0])
        (work, tails, heads), *_ = who._started(others, room=NEW)
        row = work.prompts[0].index(3 * turn % 16)
        found = [scores(who, tails, heads)[row]]
        state = who.generator._prefill(
            who.arrays, tails, heads, jax.random.key(0), 0.0, room=NEW - 1, top_k=1
        )  # fmt: skip
        found.append(np.asarray(state.past.keys_BKSH[:, row]))
        state, _ = who.generator._advance(who.arrays, state=state, steps=2, top_k=1)
        keys_ZKSH = np.asarray(state.past.keys_BKSH[:, row])  # what every layer made of the tokens said
        seen.append((row, [*found, keys_ZKSH[:, :, np.asarray(state.seen_BS[row])]]))
    assert len({row for row, _ in seen}) > 3
    for _, arrays_here in seen[1:]:
        for one, other in zip(seen[0][1], arrays_here, strict=True):
            np.testing.assert_array_equal(one, other)


def scores(who: Asker, tails: Batch, heads) -> np.ndarray:
    """Log-likelihoods of token 11 at every real position: a function of all the logits."""
    labels_BL = jnp.where(tails.segments_BL > 0, 11, IGNORE)
    return np.asarray(who.generator.score(who.arrays, tails._replace(labels_BL=labels_BL), heads=heads)[0])


@pytest.mark.slow
def test_programs_are_few_and_compiled_once():
    who = Asker(
        generator=Generator(tiny.structure(tiny.EXTENDED), eos=EOS), arrays=arrays(), ends=(EOS,), rows=16,
        tokens=10**6, readers={"image": Pictures()},
    )  # fmt: skip
    some = prompts(60)
    pairs = {(work.head_length, work.tail_length) for work in plan(some, parts=1, rows=16, tokens=10**6, room=NEW)}
    said(who, some)
    counted = dict(who.generator.programs)
    assert counted["read"] == 1 and counted["prefill"] == len(pairs) and counted["advance"] <= len(pairs)
    assert len(pairs) == 4  # two kinds of head, tails up to 8 and more
    said(who, prompts(60, seed=3)[::-1])
    assert dict(who.generator.programs) == counted


@pytest.mark.slow
def test_an_image_is_read_once_for_all_questions_of_a_batch():
    who = asker(rows=64)
    pictures = who.readers["image"]
    assert isinstance(pictures, Pictures)
    some = [prompt for prompt in prompts(60) if prompt.items]
    alike = [prompt for prompt in some if prompt.tail <= 8]
    said(who, alike)
    assert len(alike) > 15 and sorted(pictures.read_rows) == sorted({prompt.items["image"][0] for prompt in alike})


@pytest.mark.slow
def test_nobody_waits_for_rows_that_were_only_filled_up():
    """A batch whose prompts have all ended stops there, though it has empty rows."""
    n = next(n for n, ids in enumerate(together()) if len(ids) <= 1)
    who = asker()
    (work, tails, heads), *_ = who._started([prompts()[n]], room=NEW)
    state = who.generator._prefill(
        who.arrays, tails, heads, jax.random.key(0), 0.0, room=NEW - 1, top_k=1
    )  # fmt: skip
    state, _ = who.generator._advance(who.arrays, state=state, steps=NEW - 1, top_k=1)
    assert work.rows > 1 and int(state.count) == len(together()[n]) + 1


def test_an_answer_stops_before_any_of_its_ends():
    never = said(asker(eos=-1), prompts()[:4])
    ends = (-1, never[0][1], never[1][0])
    who = dataclasses.replace(asker(eos=-1), ends=ends)  # the generator goes on, the asker cuts
    cut = [next((ids[:n] for n, id in enumerate(ids) if id in ends), ids) for ids in never]
    assert said(who, prompts()[:4]) == cut != never


def test_asking_stops_where_the_text_says_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moextend_jax.evaluate.asking.LOOK", 2)
    ids = said(asker(eos=-1), prompts()[:4], stop=lambda index, so_far: len(so_far) >= 2)
    assert [len(one) for one in ids] == [3] * 4  # the first token, then two at a time
    assert said(asker(eos=-1), prompts()[:4], stop=lambda index, so_far: False) == said(asker(eos=-1), prompts()[:4])


def scored_prompts() -> list[Prompt]:
    rng = np.random.default_rng(2)
    made = []
    for n, prompt in enumerate(prompts(24)):
        targets_L = rng.integers(10, tiny.DECODER.vocab_size, prompt.tail).astype(np.int32)
        targets_L[: n % 3] = IGNORE
        made.append(Prompt(ids_L=prompt.ids_L, places_L=prompt.places_L, head=prompt.head, items=prompt.items,
                           targets_L=targets_L))  # fmt: skip
    return made


def test_scores_are_those_of_the_whole_model():
    some, who = scored_prompts(), asker()

    @jax.jit
    def logits(batch: Batch) -> jax.Array:
        model = with_arrays(tiny.structure(tiny.EXTENDED), arrays())
        return model.decoder.logits(model(batch).hidden_BLD)[0]

    found = sorted(one for batch in who.score(some) for one in batch)
    assert [index for index, _, _ in found] == list(range(len(some)))
    for (_, nats, greedy), prompt in zip(found, some, strict=True):
        batch = whole(prompt)
        logits_LV = np.asarray(logits(batch), np.float64)
        nats_LV = logits_LV - np.log(np.exp(logits_LV).sum(axis=-1, keepdims=True))
        labels_L = np.asarray(batch.labels_BL[0])
        at = np.flatnonzero(labels_L != IGNORE)
        np.testing.assert_allclose(nats, nats_LV[at, labels_L[at]].sum(), atol=1e-4, rtol=0)
        assert greedy == bool((logits_LV[at].argmax(axis=-1) == labels_L[at]).all())


def test_greedy_is_true_of_what_the_model_says():
    prompt, ids = prompts()[0], said(asker(eos=-1), prompts()[:1])[0]
    tail = np.concatenate([prompt.ids_L, ids[:-1]]).astype(np.int32)
    targets_L = np.full(len(tail) - prompt.head, IGNORE, np.int32)
    targets_L[-len(ids) :] = ids
    places_L = np.concatenate([prompt.places_L, np.full(len(ids) - 1, -1)]).astype(np.int32)
    asked = Prompt(ids_L=tail, places_L=places_L, head=prompt.head, items=prompt.items, targets_L=targets_L)
    who = asker()
    (((_, _, greedy),),) = who.score([asked])
    assert greedy


def asked(sizes: dict[str, int], *, rows: int) -> tuple[list[list[int]], list[float]]:
    """What a mesh says, of prompts of one length, and log-likelihoods."""
    who = asker(rows=rows, mesh=sizes)
    scores = sorted(score for batch in who.score(short(scored_prompts())) for score in batch)
    return said(who, short(prompts())), [nats for _, nats, _ in scores]


def short(some: Sequence[Prompt]) -> list[Prompt]:
    return [prompt for prompt in some if prompt.tail <= 8]


@functools.cache
def expected_of_meshes() -> tuple[list[list[int]], list[float]]:
    return asked({"data": 1, "fsdp": 8, "expert": 1, "tensor": 1}, rows=16)


@pytest.mark.parametrize("shape", [(1, 2, 2, 2), pytest.param((2, 1, 1, 4), marks=pytest.mark.slow)])
def test_a_mesh_says_and_scores_the_same(eight_devices, shape):
    texts, nats = asked(dict(zip(MESH_AXES, shape, strict=True)), rows=64)
    expected_texts, expected_nats = expected_of_meshes()
    assert texts == expected_texts and len({tuple(ids) for ids in texts}) > 5
    np.testing.assert_allclose(nats, expected_nats, atol=1e-4, rtol=0)
