"""Questions about images as prompts, and short-answer accuracy: what is right of the answers to a data set's."""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moextend_jax.config import MoextendError, Recipe
from moextend_jax.data.conversations import Encoded, encode_prompt, shown_first, talk_of
from moextend_jax.data.datasets import Example, ItemRef
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.data.writing import Spans
from moextend_jax.evaluate.benchmarks.scores import are_right
from moextend_jax.evaluate.prompts import Prompt
from moextend_jax.faults import Fault
from moextend_jax.settings import KEEPABLE


class Question(NamedTuple):
    """The first question of a conversation, with its right answer and what a system turn says before it; by medium the
    items that it shows, without those of later questions."""

    text: str
    answer: str
    system: str
    items: Mapping[str, Sequence[ItemRef]]


CONTROL = re.compile("[\0-\x08\x0e-\x1f]")


def question_of(example: Example, *, tokenizer: Tokenizer) -> Question:
    """Raises the `Fault` for which training refuses or skips the conversation, whatever its length.

    It costs little: texts are only encoded where they have control characters, which may stand for images.
    """
    if example.fault is not None and example.fault.kind not in KEEPABLE:
        raise example.fault.again()
    refs_of = example.by_medium
    talk = talk_of(example.conversations, example_id=example.id, items=refs_of, tokenizer=tokenizer)
    try:
        for text in (talk.system, *(text for pair in talk.pairs for text in pair)):
            if text is not None and CONTROL.search(text):
                tokenizer.encode(text)
    except MoextendError as error:
        raise Fault(f"example {example.id}: {error}", "reserved", example.id) from error
    question, answer = talk.pairs[0]
    assert answer is not None
    return Question(question, answer, talk.system, shown_first(question, refs_of, tokenizer))


def prompt_of(
    text: str, *, items: Mapping[str, tuple[int, ...]], spans: Spans, tokenizer: Tokenizer,
    recipe: Recipe, where: str, system: str = "",
) -> Prompt:  # fmt: skip
    """The chat template around a question; its head is everything up to the last item.

    Args:
      items: by medium rows of what the items are read from. spans: the tokens that each takes.
      where: names the question in messages.
    """
    try:
        encoded = encode_prompt(text, items=spans, system=system, tokenizer=tokenizer, recipe=recipe)
    except MoextendError as error:
        raise MoextendError(f"{where}: {error}") from error
    return as_prompt(encoded, items=items, where=where)


def as_prompt(encoded: Encoded, *, items: Mapping[str, tuple[int, ...]], where: str = "prompt") -> Prompt:
    """What was encoded with these items; its head is everything up to the last of them."""
    items = {name: rows for name, rows in items.items() if rows}
    last = int(np.flatnonzero(encoded.places_L >= 0)[-1]) if items else -2
    return Prompt(
        ids_L=encoded.ids_L, places_L=encoded.places_L, head=last + 2, items=items, fused=encoded.fused, where=where
    )


def accuracy(right: Sequence[str], answers: Sequence[str]) -> float:
    """Share of answers that `are_right`."""
    return sum(are_right(right, answers)) / len(right)


def frequent_answers(
    training: Iterable[Example], *, asked: Collection[str], tokenizer: Tokenizer
) -> Callable[[str], str]:
    """The best answer without the image: a question's most frequent answer in the training data; for a question that is
    not there, the most frequent answer of all.

    Args:
      training: conversations; those that training refuses or skips are left out.
      asked: the questions that will be asked; answers to others are not kept.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for example in training:
        with contextlib.suppress(Fault):
            question = question_of(example, tokenizer=tokenizer)
            if question.text in asked:
                by_question[question.text][question.answer] += 1
            overall[question.answer] += 1
    if not overall:
        raise MoextendError("no conversation of the training data has a question and an answer")
    return lambda text: (by_question.get(text) or overall).most_common(1)[0][0]
