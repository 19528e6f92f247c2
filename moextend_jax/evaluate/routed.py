"""Which experts every token of one text goes to, in every layer: a conversation in, a `Routing` out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from moextend_jax.config import IGNORE, IMAGE, ModelConfig
from moextend_jax.data.conversations import MEDIUM, Encoded, encode_conversation
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.evaluate.speak import Items, Turn, batch_of, check_media, encoded, is_plain, question, show
from moextend_jax.mesh import Program, on_host, place_whole
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from moextend_jax.runs.askable import Askable


class Routing(NamedTuple):
    """What every layer's router decided for every token of one text.

    Attributes:
      picks: the chosen experts, `[layers, tokens, k]`, most likely first. Where an extension starts "added", its
        experts stand behind these k; one that a token does not have is len(experts).
      weights: how they are mixed, `[layers, tokens, k]`.
      logits: `[layers, tokens, experts]`, float32, before the softmax; -inf where a layer has no such expert, or a
        token may not choose it.
      experts: the experts' names, `[experts]`: "0", "1", ... and "new 0", ....
      tokens: the tokens' text, `[tokens]`; those of a picture are `<patch 0>`, `<patch 1>`, ..., of a medium `sound`
        `<sound 0>`, ....
      ids: the tokens' ids, `[tokens]`.
      patches: which patch of the picture a token is, `[tokens]`, row by row from the top left; of other media which of
        their tokens; a second item counts on; -1 for text.
      media: the name of each token's medium, `[tokens]`; "" for text.
    """

    picks: np.ndarray
    weights: np.ndarray
    logits: np.ndarray
    experts: list[str]
    tokens: list[str]
    ids: np.ndarray
    patches: np.ndarray
    media: list[str]

    def __repr__(self) -> str:
        layers, tokens, k = self.picks.shape
        return f"Routing({layers} layers, {tokens} tokens, {k} of {len(self.experts)} experts each)"


def routing_of(
    opened: Askable, prompt: str | Sequence[Turn], *, items: Items, answer: str | Sequence[int] | None = None,
    plain: bool | None = None,
) -> Routing:  # fmt: skip
    """The routing of a prompt, and of the answer to it where one is given.

    Args:
      prompt, items, plain: as of `speak`.
      answer: a text, where the prompt is continued with the space before it; or the ids that the model made.
    """
    read = show(opened, items)
    if not isinstance(answer, str):
        text = _with_ids(encoded(opened, prompt, spans=read.spans, plain=plain), answer or ())
    elif is_plain(opened, plain):
        text = encoded(opened, prompt + answer if isinstance(prompt, str) else prompt, spans=read.spans, plain=True)
    else:
        check_media(opened, read.spans)
        asked = [question(opened, prompt, read.spans)] if isinstance(prompt, str) else prompt
        text = encode_conversation(
            [*asked, {"from": "gpt", "value": answer}], example_id="prompt",
            items=read.spans, tokenizer=opened.tokenizer,
            recipe=dataclasses.replace(opened.recipe, turns="all"),  # all were asked, even if one was trained on
        )  # fmt: skip
    batch, count = batch_of(opened, text, read), len(text.ids_L)
    batch.segments_BL[0, :count] = text.segments_L
    routing = routing_program(opened.config, opened.mesh)(opened.arrays, place_whole(batch, opened.mesh))
    logits_ZTO, picks_ZTk, weights_ZTk = (on_host(array)[:, :count] for array in routing[:3])
    media, patches = by_medium(opened.tokenizer, text.places_L)
    return Routing(
        picks=picks_ZTk,
        weights=weights_ZTk,
        logits=logits_ZTO,
        experts=expert_names(opened.config),
        tokens=token_texts(opened.tokenizer, text.ids_L, media, patches),
        ids=text.ids_L,
        patches=patches,
        media=media,
    )


def _with_ids(text: Encoded, ids: Sequence[int]) -> Encoded:
    """The text, and behind it ids of words."""
    more = {"ids_L": ids, "labels_L": IGNORE, "places_L": -1, "segments_L": 1}

    def followed(array_L: np.ndarray, of: Any) -> np.ndarray:
        return np.concatenate([array_L, np.broadcast_to(np.int32(of), len(ids))])

    fused = {name: followed(of_L, -1) for name, of_L in text.fused.items()}
    return text._replace(**{name: followed(getattr(text, name), of) for name, of in more.items()}, fused=fused)


@functools.lru_cache(maxsize=4)
def routing_program(config: ModelConfig, mesh: Mesh) -> Program:
    """`(arrays, batch) -> Routing`, of the router; compiled once for models of these sizes."""
    return Program(lambda arrays, batch: with_arrays(abstract(config), arrays)(batch).routing, mesh=mesh)


def expert_names(config: ModelConfig) -> list[str]:
    """Those of `Routing.experts`."""
    extensions = config.extensions
    new = [
        f"new {n}" if len(extensions) == 1 else f"{name} {n}"
        for name, added in extensions.items()
        for n in range(added.new_experts)
    ]
    return [*map(str, range(config.decoder.experts)), *new]


def by_medium(tokenizer: Tokenizer, places_L: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The medium of each token, "" of text, and its place among that medium's tokens, -1 of text; from the places of
    `data.conversations.Encoded`."""
    numbers_L, own_L = np.divmod(places_L, MEDIUM)
    names = list(tokenizer.media)
    media = [names[number] if place >= 0 else "" for number, place in zip(numbers_L, places_L, strict=True)]
    return media, np.where(places_L >= 0, own_L, -1)


def token_texts(tokenizer: Tokenizer, ids_L: np.ndarray, media: Sequence[str], own_L: np.ndarray) -> list[str]:
    """What each token adds to the text before it; a name for what is no text. media, own_L: as of `by_medium`."""
    tags = tokenizer.tags
    named = {control.id: text for text, control in tokenizer.pieces.control.items()}
    texts, before = [], []
    for n, (id, medium, place) in enumerate(zip(ids_L.tolist(), media, own_L.tolist(), strict=True)):
        if medium:
            texts.append(f"<{'patch' if medium == IMAGE else medium} {place}>")
        elif id in (tags.start, tags.end):  # all media have these
            around = media[n + 1 : n + 2] if id == tags.start else media[max(n - 1, 0) : n]
            texts.append(f"<{'/' if id == tags.end else ''}{''.join(around) or IMAGE}>")
        elif id in named:
            texts.append(named[id])
        else:
            texts.append(tokenizer.decode([*before, id])[len(tokenizer.decode(before)) :])
            before = [id]
    return texts
