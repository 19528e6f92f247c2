"""Questions about images as prompts, and short-answer accuracy: what is right of the answers to a data set's."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from moextend_jax.config import IGNORE, Batch, MoextendError, Recipe
from moextend_jax.data.batches import Features, Pixels
from moextend_jax.data.conversations import encode_prompt
from moextend_jax.data.datasets import Example
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.evaluate.prompts import Prompt


class Question(NamedTuple):
    """The first question of a conversation, with its right answer."""

    example: Example
    text: str
    answer: str


def questions_of(examples: Iterable[Example]) -> list[Question]:
    """Of the examples that are whole; the run has said of the others what is wrong with them, or refused them."""
    return [
        Question(one, one.conversations[0]["value"], one.conversations[1]["value"])
        for one in examples
        if one.fault is None
    ]


def prompt_of(
    text: str, *, images: tuple[int, ...], tokenizer: Tokenizer, recipe: Recipe, patches: int, where: str
) -> Prompt:
    """The chat template around a question; its head is everything up to the last image.

    Args:
      images: rows of whatever the pictures are read from.
    """
    try:
        encoded = encode_prompt(text, images=len(images), tokenizer=tokenizer, recipe=recipe, patches=patches)
    except MoextendError as error:
        raise MoextendError(f"{where}: {error}") from error
    last = int(np.flatnonzero(encoded.patches_L >= 0)[-1]) if images else -2
    return Prompt(ids_L=encoded.ids_L, patches_L=encoded.patches_L, head=last + 2, images=images, where=where)


def prompt_batch(
    questions: Sequence[Question],
    *,
    tokenizer: Tokenizer,
    recipe: Recipe,
    images: Pixels | Features,
    patches: int,
    length: int,
    rows: int,
) -> Batch:
    """Prompts that end where the answer begins, padded on the right to `length`, and to `rows` rows with copies."""
    ids_BL = np.zeros((rows, length), np.int32)
    segments_BL, patches_BL = np.zeros_like(ids_BL), np.full_like(ids_BL, -1)
    most = max(len(question.example.images) for question in questions)
    rows_BM = np.full((rows, most), -1, np.int32)
    for row in range(rows):
        question = questions[min(row, len(questions) - 1)]
        refs = question.example.images
        encoded = encode_prompt(question.text, images=len(refs), tokenizer=tokenizer, recipe=recipe, patches=patches)
        count = len(encoded.ids_L)
        if count > length:
            raise MoextendError(
                f"question {question.example.id}: its prompt has {count} tokens, evaluate.length is {length}; raise it"
            )
        ids_BL[row, :count] = encoded.ids_L
        segments_BL[row, :count] = 1
        patches_BL[row, :count] = encoded.patches_L
        rows_BM[row, : len(refs)] = [images.row(ref) for ref in refs]
    positions_BL = np.broadcast_to(np.arange(length, dtype=np.int32), ids_BL.shape)
    batch = Batch(ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, segments_BL, patches_BL)
    return images.fill(batch, rows_BM) if most else batch


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> float:
    """Share of answers equal to the right one but for case, outer spaces and a final full stop."""
    right = [_plain(question.answer) == _plain(said) for question, said in zip(questions, answers, strict=True)]
    return sum(right) / len(right)


def question_only_answers(training: Iterable[Question], questions: Sequence[Question]) -> list[str]:
    """The best that can be said without the image: each question's most frequent answer in the training data."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for question in training:
        seen[question.text][question.answer] += 1
        overall[question.answer] += 1
    return [(seen.get(question.text) or overall).most_common(1)[0][0] for question in questions]


def _plain(text: str) -> str:
    return text.strip().rstrip(".").lower()
