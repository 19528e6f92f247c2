"""A conversation in LLaVA's JSON to token ids and labels, in a chat template.

Goes in: turns `[{"from": "system" | "human" | "gpt", "value": text}, ...]`, a system turn first, if any, with an
`<image>` mark where an image stands, and other media's marks likewise (`Tokenizer.media`). Comes out: `Encoded`, arrays
of one conversation's length L. An item of a medium costs its tokens + 2 positions: the start tag, one pad tag per
token, the end tag; a span is never cut. An item that is added to those of another medium (`Medium.onto`) costs none:
the ids are those of the conversation without its mark and the line break behind it.

`recipe.prompt` picks the template:
  checkpoint  the base's own (`data/templates.py`); without one its family's, or that of the family which its tokens
              show; `mixtral` for Mixtral-8x7B-Instruct and for tokenizers of its time that have no template.
  mixtral     `<s> [INST] question [/INST] answer</s> [INST] ...`, as Mixtral-Instruct's own code tokenises it
              (each message after a space, messages stripped, a system turn before the first question); EOS after every
              answer.
  chatml, llama3, granite, glm4, ernie   a family's, on a base that has its tokens.
  tulu        that of Tulu and OLMoE-Instruct, on any base: roles are text.
  released    the released code: `[INST]`, question, `[/INST]` and answer tokenised apart, special tokens that are
              spelled out in the text recognised, one EOS at the very end, which keeps its label but is masked from
              attention because it is also the pad token.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Sized
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from moextend_jax.config import IGNORE, IMAGE, Batch, MoextendError, Recipe, Rooms
from moextend_jax.data.missing import without_marks
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.data.writing import Part, Spans, Talk, encoder_of, released_text
from moextend_jax.faults import Fault
from moextend_jax.settings import Parts

Item = TypeVar("Item")

MEDIUM = 1 << 24
"""Distance between two media in `Encoded.places_L`, while it is not known how many items a row holds."""


class Encoded(NamedTuple):
    """One conversation; `places_L` is -1 on text; on token p of item m of medium number n of `Tokenizer.media`, whose
    longest item has P tokens, it is n * MEDIUM + m*P + p. `segments_L` is 1, and 0 where a token is hidden from
    attention (released template only); `items` counts those in use by medium, without media that it has none of.
    `fused`: of media in use that are added to another's items, such a place for each token of these, and -1."""

    ids_L: np.ndarray
    labels_L: np.ndarray
    places_L: np.ndarray
    segments_L: np.ndarray
    items: Mapping[str, int]
    fused: Mapping[str, np.ndarray] = {}


def in_row(places_L: np.ndarray, *, first: Mapping[str, int], media: Sequence[str]) -> np.ndarray:
    """Places in a row, from those of `Encoded`. first: medium -> place where its items begin. media: names of the media
    by number."""
    if not first:
        return places_L
    numbers_L, own_L = np.divmod(places_L, MEDIUM)
    firsts = np.array([first.get(name, 0) for name in media], np.int32)
    return np.where(places_L >= 0, own_L + firsts[np.maximum(numbers_L, 0)], -1).astype(np.int32)


def text_batch(ids_BL: np.ndarray, mask_BL: np.ndarray) -> Batch:
    """Rows of text on the host, with nothing to predict. Where the mask is 0, a token belongs to no segment and nobody
    sees it; positions count on across such places, as transformers counts when nobody gives it positions."""
    positions_BL = np.tile(np.arange(ids_BL.shape[1], dtype=np.int32), (len(ids_BL), 1))
    return Batch(ids_BL, np.full_like(ids_BL, IGNORE), positions_BL, mask_BL, np.full_like(ids_BL, -1))


def encode_conversation(
    turns: Sequence[dict[str, Any]], *, example_id: str, items: Spans, tokenizer: Tokenizer, recipe: Recipe,
    length: int | None = None, too_long: Literal["error", "drop_turns"] = "error",
) -> Encoded:  # fmt: skip
    """Ids and labels of a conversation that has these items.

    `length` None means no limit. `drop_turns` leaves out whole trailing question-answer pairs until the rest
    fits; items of a dropped pair are dropped with it.

    Raises:
      Fault: names the example; wrong turns or roles, an empty answer, text that is no Unicode or stands for images,
        marks that do not match the items, or more tokens than `length`.
    """
    talk = talk_of(turns, example_id=example_id, items=items, tokenizer=tokenizer)
    if recipe.turns == "first":
        talk = talk._replace(pairs=talk.pairs[:1])
    talk, encode = _without_fused(talk, tokenizer), encoder_of(tokenizer, recipe)

    def parts_of(pairs: int) -> list[Part]:
        return encode(talk._replace(pairs=talk.pairs[:pairs]), tokenizer, items)

    def total(parts: Sequence[Part]) -> int:
        return sum(len(part.ids) for part in parts)

    try:
        parts = parts_of(pairs := len(talk.pairs))
        if length is not None and total(parts) > length and too_long == "drop_turns":
            # Fewer pairs are fewer tokens.
            pairs = bisect_right(range(1, pairs), length, key=lambda pairs: total(parts_of(pairs))) or 1
            parts = parts_of(pairs)
    except MoextendError as error:
        raise _fault(example_id, "reserved", error) from error
    if length is not None and total(parts) > length:
        hint = "raise the sequence length" + (" or drop turns that do not fit" if pairs > 1 else "")
        spans = ", ".join(f"{len(of)} {_called(name)} of {max(of) + 2}" for name, of in items.items() if of)
        message = f"{total(parts)} tokens ({spans or '0 images'}) do not fit a row of {length}; {hint}"
        raise _fault(example_id, "too_long", message)
    ids = [id for part in parts for id in part.ids]
    labels = [id for part in parts for id in (part.ids if part.label else [IGNORE] * len(part.ids))]
    return _encoded(ids, labels, tokenizer, recipe, items)


def _fault(example_id: str, kind: str, message: object) -> Fault:
    return Fault(f"example {example_id}: {message}", kind, example_id)


def _called(medium: str) -> str:
    return "images" if medium == IMAGE else f"of {medium}"


def talk_of(
    turns: Sequence[dict[str, Any]], *, example_id: str, items: Mapping[str, Sized], tokenizer: Tokenizer
) -> Talk:
    """What is said in a conversation that has these items, by medium: at least one question with its answer.

    Raises a `Fault` as `encode_conversation`, but for what only the ids show: length, and text that stands for images.
    """
    talk = _talk(turns, example_id, tokenizer)
    _check_marks([question for question, _ in talk.pairs], items, tokenizer, example_id, " in the questions")
    return talk


def shown_first(question: str, items: Mapping[str, Sequence[Item]], tokenizer: Tokenizer) -> dict[str, Sequence[Item]]:
    """Of a conversation's items, by medium, those that its first question shows; media without any are left out."""
    shown = {name: question.count(tokenizer.media[name].mark) for name in items}
    return {name: of[: shown[name]] for name, of in items.items() if shown[name]}


def _check_marks(
    texts: Sequence[str], items: Mapping[str, Sized], tokenizer: Tokenizer, example_id: str, where: str = ""
) -> None:
    for name, marked in tokenizer.media.items():
        marks, count = sum(text.count(marked.mark) for text in texts), len(items.get(name, ()))
        if marks != count:
            has = f"{count} images" if name == IMAGE else f"{count} items of {name}"
            raise _fault(example_id, "marks", f"{marks} {marked.mark} marks{where} but {has}")
    if unknown := [name for name, of in items.items() if len(of) and name not in tokenizer.media]:
        known = ", ".join(tokenizer.media)
        raise _fault(example_id, "marks", f"an item of {unknown[0]}, and the media are {known}")
    if wrong := _wrong_fusion(items, tokenizer):
        raise _fault(example_id, "marks", wrong)


def _wrong_fusion(items: Mapping[str, Sized], tokenizer: Tokenizer) -> str:
    """What is wrong with the numbers of items that are added to others; "": nothing."""
    for name, marked in tokenizer.media.items():
        count, others = len(items.get(name, ())), len(items.get(marked.onto, ()))
        if marked.onto and count and (count not in (1, others) or not others):
            return (
                f"{count} items of {name}, which are added to those of {marked.onto}, and {others} of these; there "
                "must be one for each, or one for all"
            )
    return ""


def _without_fused(talk: Talk, tokenizer: Tokenizer) -> Talk:
    """What is said without the marks of items that have no positions."""
    marks = [marked.mark for marked in tokenizer.media.values() if marked.onto]
    return talk._replace(pairs=[(without_marks(question, marks), answer) for question, answer in talk.pairs])


def encode_row(
    turns: Sequence[dict[str, Any]], *, example_id: str, items: Spans, tokenizer: Tokenizer, recipe: Recipe,
    length: int, rooms: Rooms, too_long: Literal["error", "drop_turns"] = "error", parts: Parts = "conversation",
) -> Encoded:  # fmt: skip
    """What a stage feeds of an example: the conversation, or its bare question; it fits a row, or is a `Fault`."""
    encode = encode_bare_question if parts == "bare_question" else partial(encode_conversation, too_long=too_long)
    encoded = encode(turns, example_id=example_id, items=items, tokenizer=tokenizer, recipe=recipe, length=length)
    for name, count in encoded.items.items():
        if count > rooms[name].items:
            picture = name == IMAGE
            what, setting = ("images", "images_per_row") if picture else (f"items of {name}", f"items_per_row.{name}")
            message = f"{count} {what}, but a row holds {rooms[name].items}; raise {setting}"
            raise _fault(example_id, "too_many_images", message)
    return encoded


def encode_prompt(
    question: str, *, items: Spans | None = None, system: str = "", tokenizer: Tokenizer, recipe: Recipe,
) -> Encoded:  # fmt: skip
    """Ids that end where the answer begins, for generation; without any mark of a medium its items go first."""
    items = items or {}
    for name, tokens in reversed(list(items.items())):
        mark = tokenizer.media[name].mark
        if mark not in question:
            question = f"{mark}\n" * len(tokens) + question
    for name, marked in tokenizer.media.items():
        marks, count = question.count(marked.mark), len(items.get(name, ()))
        if marks != count:
            raise MoextendError(f"prompt: {marks} {marked.mark} marks but {count} {_called(name)}: {question[:60]!r}")
    if wrong := _wrong_fusion(items, tokenizer):
        raise MoextendError(f"prompt: {wrong}")
    talk = Talk(system, [(question, None)])
    return _asking(talk, tokenizer=tokenizer, recipe=recipe, items=items)


def encode_dialogue(turns: Sequence[dict[str, Any]], *, items: Spans, tokenizer: Tokenizer, recipe: Recipe) -> Encoded:
    """Turns that end in a question: ids that end where its answer begins, as training has them before it.

    Raises:
      Fault: as `encode_conversation`.
    """
    if not turns or turns[-1].get("from") != "human":
        raise _fault("prompt", "order", "the last turn must be the user's, which is to be answered")
    answered = [*turns, {"from": "gpt", "value": "."}]
    talk = talk_of(answered, example_id="prompt", items=items, tokenizer=tokenizer)
    (question, _) = talk.pairs[-1]
    asked = talk._replace(pairs=[*talk.pairs[:-1], (question, None)])
    return _asking(asked, tokenizer=tokenizer, recipe=recipe, items=items)


def _asking(talk: Talk, *, tokenizer: Tokenizer, recipe: Recipe, items: Spans) -> Encoded:
    parts = encoder_of(tokenizer, recipe)(_without_fused(talk, tokenizer), tokenizer, items)
    ids = [id for part in parts for id in part.ids]
    return _encoded(ids, [IGNORE] * len(ids), tokenizer, recipe, items)


def encode_bare_question(
    turns: Sequence[dict[str, Any]], *, example_id: str, items: Spans, tokenizer: Tokenizer, recipe: Recipe,
    length: int | None = None,
) -> Encoded:  # fmt: skip
    """BOS and the first human turn alone, no template, no answer: what the released code feeds to count routing."""
    talk = _talk(turns, example_id, tokenizer)
    _check_marks([talk.pairs[0][0]], items, tokenizer, example_id)
    try:
        ids = [*tokenizer.prefix, *released_text(_without_fused(talk, tokenizer).pairs[0][0], tokenizer, items)]
    except MoextendError as error:
        raise _fault(example_id, "reserved", error) from error
    if length is not None and len(ids) > length:
        raise _fault(example_id, "too_long", f"a question of {len(ids)} tokens does not fit a row of {length}")
    return _encoded(ids, [IGNORE] * len(ids), tokenizer, recipe, items)


def _talk(turns: Sequence[dict[str, Any]], example_id: str, tokenizer: Tokenizer) -> Talk:
    fault = partial(_fault, example_id)
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
    marks = [marked.mark for marked in tokenizer.media.values()]
    for mark in marks:
        if mark in system:
            raise fault("marks", f"the system turn holds an {mark} mark; only questions may")
    pairs = list(zip(texts[systems::2], texts[systems + 1 :: 2], strict=True))
    for n, (_, answer) in enumerate(pairs):
        if not answer.strip():
            raise fault("empty_answer", f"answer {n + 1} is empty")
        for mark in marks:
            if mark in answer:
                raise fault("marks", f"answer {n + 1} holds an {mark} mark; only questions may")
    return Talk(system if system.strip() else "", pairs)


def _encoded(
    ids: list[int], labels: list[int], tokenizer: Tokenizer, recipe: Recipe, items: Spans,
) -> Encoded:  # fmt: skip
    ids_L = np.array(ids, np.int32)
    places_L, counts = np.full_like(ids_L, -1), {}
    for number, (name, marked) in enumerate(tokenizer.media.items()):
        if not items.get(name) or marked.onto:
            continue
        # Text can not produce the pad tag, so every one of them is a token of an item, in order.
        pads = np.flatnonzero(ids_L == marked.tags.pad)
        P, tokens = marked.tokens or max(items[name]), np.array(items[name])
        ends = np.cumsum(tokens)
        used = int(np.searchsorted(ends, len(pads), side="left")) + 1 if len(pads) else 0
        item = np.repeat(np.arange(used), tokens[:used])
        within = np.arange(len(pads)) - np.repeat(ends[:used] - tokens[:used], tokens[:used])
        places_L[pads] = number * MEDIUM + item * P + within
        if used:
            counts[name] = used
    fused = _fused(places_L, counts, tokenizer, items)
    # One item goes to all of the other medium's; of several one to each.
    counts |= {name: min(len(items[name]), counts[tokenizer.media[name].onto]) for name in fused}
    segments_L = np.ones_like(ids_L)
    if recipe.prompt == "released":
        segments_L[ids_L == tokenizer.eos] = 0
    return Encoded(ids_L, np.array(labels, np.int32), places_L, segments_L, counts, fused)


def _fused(
    places_L: np.ndarray, counts: Mapping[str, int], tokenizer: Tokenizer, items: Spans
) -> dict[str, np.ndarray]:
    """`Encoded.fused`, from the places and the numbers of the items that have positions. An item with fewer tokens than
    the one it is added to, a video's frames, begins anew behind its last."""
    numbers, fused = {name: number for number, name in enumerate(tokenizer.media)}, {}
    for name, marked in tokenizer.media.items():
        if not items.get(name) or not counts.get(marked.onto):
            continue
        onto, P = tokenizer.media[marked.onto], marked.tokens or max(items[name])
        item_L, token_L = np.divmod(places_L - numbers[marked.onto] * MEDIUM, onto.tokens or max(items[marked.onto]))
        item_L = 0 * item_L if len(items[name]) == 1 else item_L
        own_L = numbers[name] * MEDIUM + item_L * P + token_L % P
        fused[name] = np.where(places_L // MEDIUM == numbers[marked.onto], own_L, -1).astype(np.int32)
    return fused
