"""A conversation in LLaVA's JSON to token ids and labels, in a chat template.

Goes in: turns `[{"from": "system" | "human" | "gpt", "value": text}, ...]`, a system turn first, if any, with an
`<image>` mark where an image stands. Comes out: `Encoded`, arrays of one conversation's length L. An image costs
patches + 2 positions: the start tag, one pad tag per patch, the end tag; a span is never cut.

`recipe.prompt` picks the template:
  checkpoint  the base's own (`data/templates.py`), or that of the family which its tokens show; `mixtral` for
              Mixtral-8x7B-Instruct and for tokenizers of its time that have no template.
  mixtral     `<s> [INST] question [/INST] answer</s> [INST] ...`, as Mixtral-Instruct's own code tokenises it
              (each message after a space, messages stripped, a system turn before the first question); EOS after every
              answer.
  chatml, llama3   a family's, on a base that has its tokens.
  released    the released code: `[INST]`, question, `[/INST]` and answer tokenised apart, special tokens that are
              spelled out in the text recognised, one EOS at the very end, which keeps its label but is masked from
              attention because it is also the pad token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from moextend_jax.config import IGNORE, MoextendError, Recipe
from moextend_jax.data.faults import Fault
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.data.writing import MARK, Part, Talk, encoder_of, released_text


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
    talk = talk_of(turns, example_id=example_id, images=images)
    if recipe.turns == "first":
        talk = talk._replace(pairs=talk.pairs[:1])
    encode = encoder_of(tokenizer, recipe)

    def parts_of(pairs: int) -> list[Part]:
        return encode(talk._replace(pairs=talk.pairs[:pairs]), tokenizer, patches)

    def total(parts: Sequence[Part]) -> int:
        return sum(len(part.ids) for part in parts)

    try:
        parts = parts_of(pairs := len(talk.pairs))
        if length is not None and total(parts) > length and too_long == "drop_turns":
            # Fewer pairs are fewer tokens.
            pairs = bisect_right(range(1, pairs), length, key=lambda pairs: total(parts_of(pairs))) or 1
            parts = parts_of(pairs)
    except MoextendError as error:
        raise Fault(f"example {example_id}: {error}", "reserved", example_id) from error
    if length is not None and total(parts) > length:
        hint = "raise the sequence length" + (" or drop turns that do not fit" if pairs > 1 else "")
        raise Fault(
            f"example {example_id}: {total(parts)} tokens ({images} images of {patches + 2}) do not fit a row of "
            f"{length}; {hint}",
            "too_long",
            example_id,
        )
    ids = [id for part in parts for id in part.ids]
    labels = [id for part in parts for id in (part.ids if part.label else [IGNORE] * len(part.ids))]
    return _encoded(ids, labels, tokenizer, recipe, patches)


def talk_of(turns: Sequence[dict[str, Any]], *, example_id: str, images: int) -> Talk:
    """What is said in a conversation: at least one question with its answer.

    Raises a `Fault` as `encode_conversation`, but for what only the ids show: length, and text that stands for images.
    """
    talk = _talk(turns, example_id)
    marks = sum(question.count(MARK) for question, _ in talk.pairs)
    if marks != images:
        message = f"example {example_id}: {marks} {MARK} marks in the questions but {images} images"
        raise Fault(message, "marks", example_id)
    return talk


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


def encode_prompt(
    question: str, *, images: int = 0, system: str = "", tokenizer: Tokenizer, recipe: Recipe, patches: int = 0
) -> Encoded:
    """Ids that end where the answer begins, for generation; without any mark the images go first."""
    if images and MARK not in question:
        question = f"{MARK}\n" * images + question
    if question.count(MARK) != images:
        raise MoextendError(f"prompt: {question.count(MARK)} {MARK} marks but {images} images: {question[:60]!r}")
    return _asking(Talk(system, [(question, None)]), tokenizer=tokenizer, recipe=recipe, patches=patches)


def encode_dialogue(
    turns: Sequence[dict[str, Any]], *, images: int = 0, tokenizer: Tokenizer, recipe: Recipe, patches: int = 0
) -> Encoded:
    """Turns that end in a question: ids that end where its answer begins, as training has them before it.

    Raises:
      Fault: as `encode_conversation`.
    """
    talk = talk_of([*turns, {"from": "gpt", "value": "."}], example_id="prompt", images=images)
    (question, _) = talk.pairs[-1]
    asked = talk._replace(pairs=[*talk.pairs[:-1], (question, None)])
    return _asking(asked, tokenizer=tokenizer, recipe=recipe, patches=patches)


def _asking(talk: Talk, *, tokenizer: Tokenizer, recipe: Recipe, patches: int) -> Encoded:
    parts = encoder_of(tokenizer, recipe)(talk, tokenizer, patches)
    ids = [id for part in parts for id in part.ids]
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
    question, _ = _talk(turns, example_id).pairs[0]
    if question.count(MARK) != images:
        message = f"example {example_id}: {question.count(MARK)} {MARK} marks but {images} images"
        raise Fault(message, "marks", example_id)
    try:
        ids = [*tokenizer.prefix, *released_text(question, tokenizer, patches)]
    except MoextendError as error:
        raise Fault(f"example {example_id}: {error}", "reserved", example_id) from error
    if length is not None and len(ids) > length:
        message = f"example {example_id}: a question of {len(ids)} tokens does not fit a row of {length}"
        raise Fault(message, "too_long", example_id)
    return _encoded(ids, [IGNORE] * len(ids), tokenizer, recipe, patches)


def _talk(turns: Sequence[dict[str, Any]], example_id: str) -> Talk:
    def fault(kind: str, what: str) -> Fault:
        return Fault(f"example {example_id}: {what}", kind, example_id)

    try:
        roles, texts = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
    except (KeyError, TypeError) as error:
        raise fault("turn", 'a turn is not {"from": ..., "value": ...}') from error
    for role in roles:
        if role not in ("system", "human", "gpt"):
            raise fault("roles", f"unknown role {role!r:.60}; there are system, human and gpt")
    systems = int(roles[:1] == ["system"])
    spoken = roles[systems:]
    if not spoken or len(spoken) % 2 or spoken != ["human", "gpt"] * (len(spoken) // 2):
        raise fault("order", f"roles must alternate human, gpt and end with gpt (system may go first); got {roles}")
    for text in texts:
        if not isinstance(text, str):
            raise fault("turn", f"a turn's value is not text: {text!r:.60}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a pair, which JSON can spell
            raise fault("encoding", f"text that is not UTF-8: {error}") from error
    system = texts[0] if systems else ""
    if MARK in system:
        raise fault("marks", f"the system turn holds an {MARK} mark; only questions may")
    pairs = list(zip(texts[systems::2], texts[systems + 1 :: 2], strict=True))
    for n, (_, answer) in enumerate(pairs):
        if not answer.strip():
            raise fault("empty_answer", f"answer {n + 1} is empty")
        if MARK in answer:
            raise fault("marks", f"answer {n + 1} holds an {MARK} mark; only questions may")
    return Talk(system if system.strip() else "", pairs)


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
