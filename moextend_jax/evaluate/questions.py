"""Questions about images as prompts, and short-answer accuracy: what is right of the answers to a data set's."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moextend_jax.config import IGNORE, Batch, MoextendError, Recipe
from moextend_jax.data.batches import Features, Pixels
from moextend_jax.data.conversations import Encoded, encode_prompt
from moextend_jax.data.datasets import Example, first_exchange
from moextend_jax.data.faults import Fault
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.evaluate.prompts import Prompt


class Question(NamedTuple):
    """The first question of a conversation, with its right answer and what a system turn says before it."""

    example: Example
    text: str
    answer: str
    system: str = ""


def question_of(example: Example, *, tokenizer: Tokenizer) -> Question:
    """Raises the `Fault` for which training would refuse the conversation."""
    exchange = first_exchange(example, tokenizer=tokenizer)
    if isinstance(exchange, Fault):
        raise exchange
    return Question(example, *exchange)


def prompt_of(
    text: str, *, images: tuple[int, ...], tokenizer: Tokenizer, recipe: Recipe, patches: int, where: str,
    system: str = "",
) -> Prompt:  # fmt: skip
    """The chat template around a question; its head is everything up to the last image.

    Args:
      images: rows of what the pictures are read from.
      patches: positions that an image takes (P).
      where: names the question in messages.
    """
    try:
        encoded = encode_prompt(
            text, images=len(images), system=system, tokenizer=tokenizer, recipe=recipe, patches=patches
        )
    except MoextendError as error:
        raise MoextendError(f"{where}: {error}") from error
    return as_prompt(encoded, images=images, where=where)


def as_prompt(encoded: Encoded, *, images: tuple[int, ...] = (), where: str = "prompt") -> Prompt:
    """What was encoded with these images; its head is everything up to the last of them."""
    last = int(np.flatnonzero(encoded.patches_L >= 0)[-1]) if images else -2
    return Prompt(ids_L=encoded.ids_L, patches_L=encoded.patches_L, head=last + 2, images=images, where=where)


def prompt_batch(prompts: Sequence[Prompt], *, images: Pixels | Features, rows: int, length: int) -> Batch:
    """Prompts that end where the answer begins, padded on the right to `length`, and to `rows` rows with empty ones."""
    ids_BL = np.zeros((rows, length), np.int32)
    segments_BL, patches_BL = np.zeros_like(ids_BL), np.full_like(ids_BL, -1)
    most = max(len(prompt.images) for prompt in prompts)
    rows_BM = np.full((rows, most), -1, np.int32)
    for row, prompt in enumerate(prompts):
        count = len(prompt.ids_L)
        ids_BL[row, :count] = prompt.ids_L
        segments_BL[row, :count] = 1
        patches_BL[row, :count] = prompt.patches_L
        rows_BM[row, : len(prompt.images)] = prompt.images
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BL.shape)
    batch = Batch(ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, segments_BL, patches_BL)
    return images.fill(batch, rows_BM) if most else batch


def accuracy(right: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers equal to the right one but for case, outer spaces and a final full stop."""
    return sum(_plain(a) == _plain(b) for a, b in zip(right, answers, strict=True)) / len(right)


def question_only_answers(training: Iterable[Example], texts: Sequence[str], *, tokenizer: Tokenizer) -> list[str]:
    """The best answers without the image: each question's most frequent one in the training data.

    Args:
      training: conversations; those that training refuses or skips are left out.
      texts: the questions; one that training does not have gets the most frequent answer of all.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for example in training:
        with contextlib.suppress(Fault):
            question = question_of(example, tokenizer=tokenizer)
            by_question[question.text][question.answer] += 1
            overall[question.answer] += 1
    if not overall:
        raise MoextendError("no conversation of the training data has a question and an answer")
    return [(by_question.get(text) or overall).most_common(1)[0][0] for text in texts]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
