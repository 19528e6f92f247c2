"""Generation with a cache equals the loop without one, row by row, whatever else stands in the batch."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from moextend_jax import generate
from moextend_jax.config import IGNORE, Batch, MoextendError
from moextend_jax.generate import Generator, Sampling, choose, likeliest
from moextend_jax.parameters import with_arrays

NEW, EOS = 6, 9
NEVER = -1


@functools.cache
def model():
    arrays = tiny.arrays(tiny.EXTENDED)
    arrays["decoder/embed"] = arrays["decoder/embed"] * 2  # livelier answers
    return tiny.structure(tiny.EXTENDED), arrays


@functools.cache
def generator(eos: int = NEVER, suppress: tuple[int, ...] = (), ends: tuple[int, ...] = ()) -> Generator:
    return Generator(model()[0], eos=eos, ends=ends, suppress=suppress)


def prompts() -> Batch:
    """Three prompts of 14, 13 and 12 tokens; the first and third with an image."""
    batch = tiny.batch()
    return jax.tree.map(jnp.asarray, batch._replace(labels_BL=np.full_like(batch.labels_BL, IGNORE)))


def padded(batch: Batch, by: int) -> Batch:
    def pad(array, value):
        return jnp.pad(array, ((0, 0), (0, by)), constant_values=value)

    return batch._replace(
        ids_BL=pad(batch.ids_BL, 8), labels_BL=pad(batch.labels_BL, IGNORE), positions_BL=pad(batch.positions_BL, 0),
        segments_BL=pad(batch.segments_BL, 0), places_BL=pad(batch.places_BL, -1),
    )  # fmt: skip


@functools.cache
def greedy() -> np.ndarray:
    return tiny.complete(generator(), model()[1], prompts(), max_new_tokens=NEW)


def test_the_answers_are_worth_comparing():
    assert greedy().shape == (3, NEW)
    assert len(np.unique(greedy())) > 4 and len({tuple(row) for row in greedy()}) == 3


def test_a_cached_greedy_answer_equals_running_the_whole_model_for_each_token():
    structure, arrays = model()

    @jax.jit
    def next_logits(batch: Batch):
        whole = with_arrays(structure, arrays)
        return whole.decoder.logits(whole(batch).hidden_BLD)

    batch = padded(prompts(), NEW)
    length_B = np.asarray((prompts().segments_BL > 0).sum(axis=1))
    rows_B = np.arange(3)
    for count in range(NEW):
        at_B = length_B + count
        logits_BV = next_logits(batch)[rows_B, at_B - 1]
        ids_B = np.asarray(logits_BV.argmax(axis=-1))
        np.testing.assert_array_equal(ids_B, greedy()[:, count])
        batch = batch._replace(
            ids_BL=batch.ids_BL.at[rows_B, at_B].set(ids_B),
            positions_BL=batch.positions_BL.at[rows_B, at_B].set(at_B),
            segments_BL=batch.segments_BL.at[rows_B, at_B].set(1),
        )


def test_streaming_says_the_same():
    said = list(generator().stream(model()[1], prompts(), max_new_tokens=NEW))
    np.testing.assert_array_equal(np.stack(said, axis=1), greedy())


def test_a_row_depends_neither_on_the_others_nor_on_padding():
    one = jax.tree.map(lambda array: array[1:2], prompts())
    np.testing.assert_array_equal(tiny.complete(generator(), model()[1], one, max_new_tokens=NEW)[0], greedy()[1])
    wider = tiny.complete(generator(), model()[1], padded(prompts(), 7), max_new_tokens=NEW)
    np.testing.assert_array_equal(wider, greedy())


def test_a_row_that_ended_is_filled_with_eos_and_the_others_go_on():
    eos = int(greedy()[0, 2])
    firsts = [int(np.flatnonzero(row == eos)[0]) if (row == eos).any() else NEW for row in greedy()]
    expected = np.array([[*row[: first + 1], *[eos] * NEW][:NEW] for row, first in zip(greedy(), firsts, strict=True)])
    assert max(firsts) > firsts[0]
    np.testing.assert_array_equal(tiny.complete(generator(eos), model()[1], prompts(), max_new_tokens=NEW), expected)
    said = np.stack(list(generator(eos).stream(model()[1], prompts(), max_new_tokens=NEW)), axis=1)
    np.testing.assert_array_equal(said, expected[:, : said.shape[1]])


def test_each_of_several_ends_ends_a_row():
    """A model may end its answers with one token and its texts with another."""
    ends = tuple({int(row[n]) for row, n in zip(greedy(), (1, 2, 4), strict=True)})
    firsts = [int(np.flatnonzero(np.isin(row, ends))[0]) for row in greedy()]
    rows = zip(greedy(), firsts, strict=True)
    expected = np.array([[*row[: first + 1], *[NEVER] * NEW][:NEW] for row, first in rows])
    assert len(set(greedy()[range(3), firsts])) > 1
    of = generator(NEVER, ends=ends)
    np.testing.assert_array_equal(tiny.complete(of, model()[1], prompts(), max_new_tokens=NEW), expected)
    said = list(of.stream(model()[1], prompts(), max_new_tokens=NEW))
    assert len(said) == max(firsts) + 1


def test_no_new_tokens_are_refused():
    with pytest.raises(MoextendError, match="max_new_tokens = 0 must be at least 1"):
        tiny.complete(generator(), model()[1], prompts(), max_new_tokens=0)


def test_streaming_stops_when_every_row_has_ended():
    one = jax.tree.map(lambda array: array[:1], prompts())
    eos = int(greedy()[0, 2])
    first = int(np.flatnonzero(greedy()[0] == eos)[0])
    said = [int(ids_B[0]) for ids_B in generator(eos).stream(model()[1], one, max_new_tokens=NEW)]
    assert said == greedy()[0, : first + 1].tolist()


def test_suppressed_tokens_are_never_said():
    banned = tuple(sorted({int(token) for token in greedy()[:, 0]}))
    said = tiny.complete(generator(NEVER, banned), model()[1], prompts(), max_new_tokens=NEW)
    assert not np.isin(said, banned).any()


# --- the choice of one token ------------------------------------------------------------------------------------------

LOGITS_BV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12)), jnp.float32)


def draws(temperature: float, *, top_k: int = 0, suppress: tuple[int, ...] = (), count: int = 400) -> np.ndarray:
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(jax.vmap(lambda key: choose(LOGITS_BV, key, temperature, top_k=top_k, suppress=suppress))(keys))


def test_sampling_gives_the_top_k_tokens_alone_and_all_of_them():
    said_nB = draws(1.5, top_k=3)
    for row in range(2):
        assert set(said_nB[:, row]) == set(np.argsort(-LOGITS_BV[row])[:3].tolist())


def test_draws_follow_the_softmax_at_the_temperature():
    said_n = draws(2.0, count=4000)[:, 0]
    shares_V = np.bincount(said_n, minlength=12) / len(said_n)
    np.testing.assert_allclose(shares_V, jax.nn.softmax(LOGITS_BV[0] / 2.0), atol=0.03)


def test_suppressed_tokens_are_never_drawn_and_leave_room_for_others():
    best = np.argsort(-LOGITS_BV[0]).tolist()
    said_n = draws(1.0, top_k=2, suppress=tuple(best[:2]))[:, 0]
    assert set(said_n) == set(best[2:4])


def test_the_same_seed_draws_the_same_tokens_and_another_one_others():
    """Another temperature too, by the same programs: whoever serves a model lets everybody say one."""

    def sampled(seed: int, temperature: float = 3.0) -> list[list[int]]:
        said = tiny.complete(
            generator(), model()[1], prompts(), max_new_tokens=NEW, sampling=Sampling(temperature), seed=seed
        )
        return said.tolist()

    wanted = greedy().tolist()
    drawn, counted = sampled(1), dict(generator().programs)
    assert drawn == sampled(1) != sampled(2)
    assert sampled(1, 1e-4) == wanted != drawn
    assert dict(generator().programs) == counted


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0, top_k=3), Sampling(temperature=3.0, top_k=1)])
def test_no_temperature_is_greedy_as_is_one_token_to_draw_from(sampling: Sampling):
    """By the programs of greedy answers."""
    wanted, counted = greedy(), dict(generator().programs)
    said = tiny.complete(generator(), model()[1], prompts(), max_new_tokens=NEW, sampling=sampling)
    np.testing.assert_array_equal(said, wanted)
    assert dict(generator().programs) == counted


@pytest.mark.parametrize("where", ["cpu", "tpu"])
@pytest.mark.parametrize("width", [3, 128, 129, 700])
def test_the_likeliest_is_the_first_of_the_largest_that_may_be_said(monkeypatch, where: str, width: int):
    monkeypatch.setattr(generate, "platform", lambda: where)
    rng = np.random.default_rng(width)
    logits_BV = rng.integers(-3, 3, (50, width)).astype(np.float32)  # many ties
    logits_BV[0] = -np.inf
    for suppress in ((), (0,), (1, width - 1), tuple(range(min(130, width - 1)))):
        allowed_BV = logits_BV.copy()
        allowed_BV[:, list(suppress)] = -np.inf
        got_B = likeliest(jnp.asarray(logits_BV), suppress=suppress)
        np.testing.assert_array_equal(got_B, allowed_BV.argmax(axis=1))
