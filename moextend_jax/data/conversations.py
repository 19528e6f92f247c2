"""A conversation in LLaVA's JSON to token ids and labels, in one of two chat templates.

Goes in: turns `[{"from": "human" | "gpt", "value": text}, ...]` with an `<image>` mark where an image stands.
Comes out: `Encoded`, arrays of one conversation's length L. An image costs patches + 2 positions: the start tag,
one pad tag per patch, the end tag; a span is never cut.

`recipe.prompt` picks the template:
  mixtral   `<s> [INST] question [/INST] answer</s> [INST] ...`, as Mixtral-Instruct's own code tokenises it
            (each message after a space, messages stripped); EOS after every answer.
  released  the released code: `[INST]`, question, `[/INST]` and answer tokenised apart, special tokens that are
            spelled out in the text recognised, one EOS at the very end, which keeps its label but is masked from
            attention because it is also the pad token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.config import IGNORE, MoextendError, Recipe
from moextend_jax.data.faults import Fault
from moextend_jax.data.tokenizer import Tokenizer

MARK = "<image>"


class Encoded(NamedTuple):
    """One conversation; `patches_L` is m*P+p on patch p of image m, -1 elsewhere; `segments_L` is 1, and 0 where
    a token is hidden from attention (released template only); `images` counts the images in use."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    patches_L: np.ndarray
    segments_L: np.ndarray
    images: int


def encode_conversation(
    turns: Sequence[dict[str, Any]],
    *,
    example_id: str,
    images: int,
    tokenizer: Tokenizer,
    recipe: Recipe,
    patches: int,
    length: int | None = None,
    too_long: Literal["error", "drop_turns"] = "error",
) -> Encoded:
    """Ids and labels of a conversation that has `images` images of `patches` patches each.

    `length` None means no limit. `drop_turns` leaves out whole trailing question-answer pairs until the rest
    fits; images of a dropped pair are dropped with it.

    Raises:
      Fault: names the example; wrong turns or roles, an empty answer, text that is no Unicode or stands for images,
        `<image>` marks that do not match the images, or more tokens than `length`.
    """
    pairs = pairs_of(turns, example_id=example_id, images=images)
    if recipe.turns == "first":
        pairs = pairs[:1]
    try:
        parts = [_encode_pair(question, answer, tokenizer, recipe, patches) for question, answer in pairs]
    except MoextendError as error:
        raise Fault(f"example {example_id}: {error}", "reserved", example_id) from error
    final = [tokenizer.eos] if recipe.prompt == "released" else []
    total = 1 + len(final) + sum(len(question) + len(answer) for question, answer in parts)
    while length is not None and total > length:
        if too_long == "error" or len(parts) == 1:
            hint = "raise the sequence length" + (" or drop turns that do not fit" if len(parts) > 1 else "")
            raise Fault(
                f"example {example_id}: {total} tokens ({images} images of {patches + 2}) do not fit a row of "
                f"{length}; {hint}",
                "too_long",
                example_id,
            )
        question, answer = parts.pop()
        total -= len(question) + len(answer)
    ids, labels = [tokenizer.bos], [tokenizer.bos if recipe.prompt == "released" else IGNORE]
    for question, answer in parts:
        ids += question + answer
        labels += [IGNORE] * len(question) + answer
    return _encoded(ids + final, labels + final, tokenizer, recipe, patches)


def pairs_of(turns: Sequence[dict[str, Any]], *, example_id: str, images: int) -> list[tuple[str, str]]:
    """The questions and answers of a conversation, at least one pair.

    Raises a `Fault` as `encode_conversation`, but for what only the ids show: length, and text that stands for images.
    """
    pairs = _pairs(turns, example_id)
    marks = sum(question.count(MARK) for question, _ in pairs)
    if marks != images:
        message = f"example {example_id}: {marks} {MARK} marks in the questions but {images} images"
        raise Fault(message, "marks", example_id)
    return pairs


def encode_row(
    turns: Sequence[dict[str, Any]],
    *,
    example_id: str,
    images: int,
    tokenizer: Tokenizer,
    recipe: Recipe,
    patches: int,
    length: int,
    images_per_row: int,
    too_long: Literal["error", "drop_turns"] = "error",
    parts: Literal["conversation", "bare_question"] = "conversation",
) -> Encoded:
    """What a stage feeds of an example: the conversation, or its bare question; it fits a row, or is a `Fault`."""
    encode = encode_bare_question if parts == "bare_question" else partial(encode_conversation, too_long=too_long)
    encoded = encode(
        turns,
        example_id=example_id,
        images=images,
        tokenizer=tokenizer,
        recipe=recipe,
        patches=patches,
        length=length,
    )
    if encoded.images > images_per_row:
        raise Fault(
            f"example {example_id}: {encoded.images} images, but a row holds {images_per_row}; raise images_per_row",
            "too_many_images",
            example_id,
        )
    return encoded


def encode_prompt(question: str, *, images: int = 0, tokenizer: Tokenizer, recipe: Recipe, patches: int = 0) -> Encoded:
    """Ids that end where the answer begins, for generation; without any mark the images go first."""
    if images and MARK not in question:
        question = f"{MARK}\n" * images + question
    if question.count(MARK) != images:
        raise MoextendError(f"prompt: {question.count(MARK)} {MARK} marks but {images} images: {question[:60]!r}")
    encode, _ = TEMPLATES[recipe.prompt]
    ids = [tokenizer.bos, *encode(question, tokenizer, patches)]
    return _encoded(ids, [IGNORE] * len(ids), tokenizer, recipe, patches)


def encode_bare_question(
    turns: Sequence[dict[str, Any]],
    *,
    example_id: str,
    images: int,
    tokenizer: Tokenizer,
    recipe: Recipe,
    patches: int,
    length: int | None = None,
) -> Encoded:
    """BOS and the first human turn alone, no template, no answer: what the released code feeds to count routing."""
    question, _ = _pairs(turns, example_id)[0]
    if question.count(MARK) != images:
        message = f"example {example_id}: {question.count(MARK)} {MARK} marks but {images} images"
        raise Fault(message, "marks", example_id)
    try:
        ids = [tokenizer.bos, *_released_text(question, tokenizer, patches)]
    except MoextendError as error:
        raise Fault(f"example {example_id}: {error}", "reserved", example_id) from error
    if length is not None and len(ids) > length:
        message = f"example {example_id}: a question of {len(ids)} tokens does not fit a row of {length}"
        raise Fault(message, "too_long", example_id)
    return _encoded(ids, [IGNORE] * len(ids), tokenizer, recipe, patches)


def _pairs(turns: Sequence[dict[str, Any]], example_id: str) -> list[tuple[str, str]]:
    def fault(kind: str, what: str) -> Fault:
        return Fault(f"example {example_id}: {what}", kind, example_id)

    try:
        roles, texts = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
    except (KeyError, TypeError) as error:
        raise fault("turn", 'a turn is not {"from": ..., "value": ...}') from error
    for role in roles:
        if role not in ("human", "gpt"):
            raise fault("roles", f"unknown role {role!r:.60}; there are human and gpt")
    if not roles or len(roles) % 2 or roles != ["human", "gpt"] * (len(roles) // 2):
        raise fault("order", f"roles must alternate human, gpt and end with gpt; got {roles}")
    for text in texts:
        if not isinstance(text, str):
            raise fault("turn", f"a turn's value is not text: {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
            raise fault("encoding", f"text that is not UTF-8: {error}") from error
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for n, (_, answer) in enumerate(pairs):
        if not answer.strip():
            raise fault("empty_answer", f"answer {n + 1} is empty")
        if MARK in answer:
            raise fault("marks", f"answer {n + 1} holds an {MARK} mark; only questions may")
    return pairs


def _encode_pair(question: str, answer: str, tokenizer: Tokenizer, recipe: Recipe, patches: int):
    encode_question, encode_answer = TEMPLATES[recipe.prompt]
    return encode_question(question, tokenizer, patches), encode_answer(answer, tokenizer, patches)


def _encoded(ids: list[int], labels: list[int], tokenizer: Tokenizer, recipe: Recipe, patches: int) -> Encoded:
    ids_L = np.array(ids, np.int32)
    pads_L = ids_L == tokenizer.tags.pad
    # Text can not produce the pad tag, so every one of them is a patch, in order.
    patches_L = np.where(pads_L, np.cumsum(pads_L, dtype=np.int32) - 1, -1).astype(np.int32)
    segments_L = np.ones_like(ids_L)
    if recipe.prompt == "released":
        segments_L[ids_L == tokenizer.eos] = 0
    return Encoded(
        ids_L, np.array(labels, np.int32), patches_L, segments_L, int(pads_L.sum()) // patches if patches else 0
    )


def _span(tokenizer: Tokenizer, patches: int) -> list[int]:
    return [tokenizer.tags.start, *[tokenizer.tags.pad] * patches, tokenizer.tags.end]


def _mixtral_question(question: str, tokenizer: Tokenizer, patches: int) -> list[int]:
    # A space before an image would be a token of its own that says nothing.
    first, *rest = re.sub(f" *{MARK}", MARK, f"[INST] {question.strip()} [/INST]").split(MARK)
    ids = tokenizer.encode(first)
    for text in rest:
        ids = ids + _span(tokenizer, patches) + tokenizer.encode_continued(text)
    return ids


def _mixtral_answer(answer: str, tokenizer: Tokenizer, patches: int) -> list[int]:
    return [*tokenizer.encode(answer.strip()), tokenizer.eos]


def _released_question(question: str, tokenizer: Tokenizer, patches: int) -> list[int]:
    return [
        *_released_text("[INST]", tokenizer, patches),
        *_released_text(question, tokenizer, patches),
        *_released_text("[/INST]", tokenizer, patches),
    ]


def _released_text(text: str, tokenizer: Tokenizer, patches: int) -> list[int]:
    """A space goes before the text, and with `legacy` once more before it and after every special token."""
    special = {MARK: _span(tokenizer, patches), "<s>": [tokenizer.bos], "</s>": [tokenizer.eos], "<unk>": [0]}
    encode = tokenizer.encode if tokenizer.legacy else tokenizer.encode_continued
    chunks = [chunk for chunk in re.split("(<image>|<s>|</s>|<unk>)", f" {text}") if chunk]
    if not tokenizer.legacy and chunks[0] == " " and len(chunks) > 1:
        chunks = chunks[1:]
    return [id for chunk in chunks for id in (special[chunk] if chunk in special else encode(chunk))]


Encoder = Callable[[str, Tokenizer, int], list[int]]
TEMPLATES: dict[str, tuple[Encoder, Encoder]] = {
    "mixtral": (_mixtral_question, _mixtral_answer),
    "released": (_released_question, _released_text),
}
