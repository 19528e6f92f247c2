"""Plans of batches: every prompt once, in shapes that are its own, few of them, shared heads side by side."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.prompts import Prompt, Work, bucket, plan, rows_of
from moextend_jax.generate import ALIGNED_ROWS


def prompt(head: int, tail: int, *, image: int = 0) -> Prompt:
    length = head + tail
    return Prompt(
        ids_L=np.arange(length, dtype=np.int32), places_L=np.full(length, -1, np.int32), head=head,
        items={"image": (image,)} if head else {},
    )  # fmt: skip


def some(count: int = 300) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        prompt(int(head), int(tail), image=int(image))
        for head, tail, image in zip(
            rng.choice([0, 30, 47], count), rng.integers(1, 90, count), rng.integers(0, 9, count), strict=True
        )
    ]


def shape(work: Work) -> tuple[int, ...]:
    return work.head_length, work.tail_length, work.rows, work.heads_at_once


def shapes(prompts: list[Prompt], **options: int) -> dict[int, tuple[int, ...]]:
    return {n: shape(work) for work in plan(prompts, **options) for part in work.prompts for n in part}


OPTIONS = {"parts": 2, "rows": 32, "tokens": 2000}


def test_buckets_hold_their_lengths_and_are_few():
    for per_octave in (2, 4):
        found = [bucket(length, per_octave=per_octave) for length in range(1, 4097)]
        assert all(size >= length for length, size in enumerate(found, 1))
        assert found == sorted(found)
        assert len(set(found)) <= per_octave * math.log2(4096 / 8) + 1
        assert max(size / length for length, size in enumerate(found, 1) if length > 8) <= 1 + 1 / per_octave


def test_every_prompt_is_asked_once_and_fits():
    prompts = some()
    works = plan(prompts, **OPTIONS)
    assert sorted(n for work in works for part in work.prompts for n in part) == list(range(len(prompts)))
    for work in works:
        assert len(work.prompts) == len(work.heads) == 2
        assert work.rows % ALIGNED_ROWS == 0 and work.heads_at_once % ALIGNED_ROWS == 0
        for part, heads, head_of in zip(work.prompts, work.heads, work.head_of, strict=True):
            assert len(part) <= work.rows
            for row, n in enumerate(part):
                assert prompts[n].tail <= work.tail_length and prompts[n].head <= work.head_length
                if work.head_length:
                    other = prompts[heads[head_of[row]]]
                    assert other.items == prompts[n].items and other.head == prompts[n].head
            assert len(heads) == len({(prompts[n].head, prompts[n].items["image"]) for n in part if prompts[n].head})
            assert len(heads) <= work.readings * work.heads_at_once


def test_the_shapes_of_a_prompt_are_its_own():
    """So that the programs that answer it, and with them its answer, do not depend on what else is asked."""
    prompts = some()
    together = shapes(prompts, **OPTIONS)
    for n in (0, 7, 150):
        assert shapes([prompts[n]], **OPTIONS)[0] == together[n]
    assert list(shapes(prompts[::-1], **OPTIONS).items()) != list(together.items())
    assert {len(prompts) - 1 - n: of for n, of in shapes(prompts[::-1], **OPTIONS).items()} == together


def test_a_batch_has_prompts_of_the_same_media_alone():
    """Which extensions may run follows from the media that a batch has."""
    media: list[dict[str, tuple[int, ...]]] = [{"image": (0,)}, {"sound": (0,)}, {"image": (0,), "sound": (0,)}]
    prompts = [dataclasses.replace(prompt(20, 9), items=media[n % 3]) for n in range(48)]
    works = plan(prompts, parts=1, rows=64, tokens=10**6)
    assert sorted(work.media for work in works) == sorted(map(tuple, media))
    for work in works:
        assert {tuple(prompts[n].items) for n in work.prompts[0]} == {work.media}
        assert len(work.prompts[0]) == 16 and len(work.heads[0]) == 1


def test_questions_about_one_image_stand_side_by_side():
    prompts = [prompt(20, 9, image=n % 4) for n in range(64)]
    (work,) = plan(prompts, parts=1, rows=64, tokens=10**6)
    assert len(work.heads[0]) == 4 and work.readings == 1
    assert [prompts[n].items["image"] for n in work.prompts[0]] == sorted(one.items["image"] for one in prompts)


def test_long_prompts_come_in_smaller_batches():
    assert rows_of(100, rows=64, tokens=3200) == 32
    assert rows_of(10, rows=64, tokens=3200) == 64
    assert rows_of(100, rows=61, tokens=10**6) == 56
    assert rows_of(5000, rows=64, tokens=3200) == ALIGNED_ROWS


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(MoextendError, match="without tokens"):
        plan([prompt(3, 0)], **OPTIONS)
