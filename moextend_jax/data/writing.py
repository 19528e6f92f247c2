"""A talk to token ids, as `recipe.prompt` says: Mixtral's own way, the released code's, or a Jinja template's.

Goes in: a `Talk`, and the tokens that each item of a medium takes. Comes out: `Part`s, ids that follow one another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

from moextend_jax.config import IMAGE, MoextendError, Recipe
from moextend_jax.data.pieces import Control
from moextend_jax.data.templates import FAMILIES, Place, Script, Shape, Template, end_of, script
from moextend_jax.data.tokenizer import Marked, Tokenizer

MARK = f"<{IMAGE}>"

Spans = Mapping[str, Sequence[int]]
"""By medium the tokens of each of a conversation's items, in the order of the marks."""


class Talk(NamedTuple):
    """What is said. system: empty where there is no such turn. The last answer is None where it is asked for."""

    system: str
    pairs: Sequence[tuple[str, str | None]]

    @property
    def folded(self) -> Sequence[tuple[str, str | None]]:
        """The pairs with the system turn before the first question, as Mistral's code puts it."""
        if not self.system:
            return self.pairs
        (question, answer), *rest = self.pairs
        return [(f"{self.system}\n\n{question}", answer), *rest]


class Part(NamedTuple):
    """Ids that follow one another; `label`: the model learns to say them."""

    ids: list[int]
    label: bool


def prompt_of(tokenizer: Tokenizer, recipe: Recipe) -> str | None:
    """The name of the recipe's template, "checkpoint" resolved; None where the checkpoint has none."""
    return tokenizer.prompt if recipe.prompt == "checkpoint" else recipe.prompt


def encoder_of(tokenizer: Tokenizer, recipe: Recipe) -> Encoder:
    """How the recipe's template encodes.

    Raises:
      MoextendError: no such template is known for the base.
    """
    name = prompt_of(tokenizer, recipe)
    if name is None:
        raise MoextendError(
            f"{tokenizer.where} has no chat template, and its tokens are of no family that is known: put a "
            "chat_template.jinja there, or set recipe.prompt to mixtral or tulu"
        )
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name not in tokenizer.templates:
        raise MoextendError(
            f"recipe.prompt = {name} needs the tokens {' '.join(FAMILIES[name].tokens)}, and the tokenizer in "
            f"{tokenizer.where} lacks some of them; set it to tulu or mixtral, which need none of their own"
        )
    end_of(tokenizer.templates[name])  # what cannot be taught is said now, and not of each conversation
    return partial(_by_template, tokenizer.templates[name])


def template_identity(tokenizer: Tokenizer, recipe: Recipe) -> str:
    """What a run remembers of its template: its name, of the checkpoint's own also what is in it."""
    name = prompt_of(tokenizer, recipe)
    if name != "own":
        return str(name)
    template = tokenizer.templates[name]
    digest = hashlib.sha256(json.dumps([template.source, dict(template.roles)], sort_keys=True).encode())
    return f"own {digest.hexdigest()[:16]}"


# --- templates --------------------------------------------------------------------------------------------------------


class _Marks:
    """Writes the next item of a medium, in ids, where its mark stands."""

    def __init__(self, tokenizer: Tokenizer, items: Spans):
        self._by_mark: dict[str, tuple[Marked, Iterator[int]]] = {
            marked.mark: (marked, iter(items.get(name, ()))) for name, marked in tokenizer.media.items()
        }
        marks = "|".join(map(re.escape, self._by_mark))
        self.split = re.compile(f" *({marks})")

    def write(self, mark: str) -> list[int]:
        marked, tokens = self._by_mark[mark]
        return [marked.tags.start, *[marked.tags.pad] * next(tokens), marked.tags.end]


def _mixtral(talk: Talk, tokenizer: Tokenizer, items: Spans) -> list[Part]:
    parts, spans = [Part([*tokenizer.prefix], False)], _Marks(tokenizer, items)
    for question, answer in talk.folded:
        text = f"[INST] {question.strip()} [/INST]"
        parts.append(Part(_with_items(text, tokenizer, spans, continued=False), False))
        if answer is not None:
            parts.append(Part([*tokenizer.encode(answer.strip()), tokenizer.eos], True))
    return parts


def _released(talk: Talk, tokenizer: Tokenizer, items: Spans) -> list[Part]:
    parts, spans = [Part([*tokenizer.prefix], True)], _Marks(tokenizer, items)
    for question, answer in talk.folded:
        texts = ("[INST]", question, "[/INST]")
        parts.append(Part([id for text in texts for id in _released_text(text, tokenizer, spans)], False))
        if answer is None:
            return parts
        parts.append(Part(_released_text(answer, tokenizer, spans), True))
    return [*parts, Part([tokenizer.eos], True)]


def released_text(text: str, tokenizer: Tokenizer, items: Spans) -> list[int]:
    """A space goes before the text, and with `legacy` once more before it and after every special token."""
    return _released_text(text, tokenizer, _Marks(tokenizer, items))


def _released_text(text: str, tokenizer: Tokenizer, spans: _Marks) -> list[int]:
    special = {"<s>": [*tokenizer.prefix], "</s>": [tokenizer.eos], "<unk>": [0]}
    marks = [marked.mark for marked in tokenizer.media.values()]
    encode = tokenizer.encode if tokenizer.legacy else tokenizer.encode_continued
    chunks = [chunk for chunk in re.split(f"({'|'.join(map(re.escape, (*marks, *special)))})", f" {text}") if chunk]
    if not tokenizer.legacy and chunks[0] == " " and len(chunks) > 1:
        chunks = chunks[1:]
    ids: list[int] = []
    for chunk in chunks:
        ids += spans.write(chunk) if chunk in marks else special[chunk] if chunk in special else encode(chunk)
    return ids


def _by_template(template: Template, talk: Talk, tokenizer: Tokenizer, items: Spans) -> list[Part]:
    """A conversation or a prompt as a Jinja template writes it.

    Raises:
      MoextendError: the template does not write this conversation as it writes others of its shape.
    """
    pairs, system = talk.pairs, bool(talk.system)
    shape = Shape(len(pairs), system, open=pairs[-1][1] is None)
    written = script(template, shape)
    if written.folded:
        pairs, system = talk.folded, False
    texts = [talk.system] * system + [text for pair in pairs for text in pair if text is not None]
    _check_written(template, shape._replace(system=system), texts, written)
    parts: list[Part] = []
    media = _Marks(tokenizer, items)
    before: Control | Literal["nothing", "text"] = "nothing"
    for span in written.spans:
        ids: list[int] = []
        text = ""
        for item in (*span.items, None):
            if isinstance(item, str | Place):
                text += item if isinstance(item, str) else _outer(texts[item.turn], item)
                continue
            if isinstance(before, Control) and before.right:
                text = text.lstrip()
            if item is not None and item.left:
                text = text.rstrip()
            if text:
                continued = before == "text" or (isinstance(before, Control) and not tokenizer.legacy)
                ids += _with_items(text, tokenizer, media, continued=continued)
                before, text = "text", ""
            if item is not None:
                ids.append(item.id)
                before = item
        parts.append(Part(ids, span.answer))
    return parts


def _check_written(template: Template, shape: Shape, texts: Sequence[str], written: Script) -> None:
    messages = [{"role": role, "content": text} for role, text in zip(shape.roles, texts, strict=True)]
    expected = (item if isinstance(item, str) else _outer(texts[item.turn], item) for item in written.text)
    if template.render(messages, open=shape.open) != "".join(expected):
        raise MoextendError(f"{template.where} changes the text of this conversation")


def _outer(text: str, place: Place) -> str:
    text = text.lstrip() if place.left else text
    return text.rstrip() if place.right else text


Encoder = Callable[[Talk, Tokenizer, Spans], list[Part]]
TEMPLATES: dict[str, Encoder] = {"mixtral": _mixtral, "released": _released}
"""Those that no Jinja template writes."""


def _with_items(text: str, tokenizer: Tokenizer, spans: _Marks, *, continued: bool) -> list[int]:
    # A space before an item would be a token of its own that says nothing.
    first, *rest = spans.split.split(text) if "<" in text else [text]
    ids = tokenizer.encode_continued(first) if continued else tokenizer.encode(first)
    for mark, text in zip(rest[::2], rest[1::2], strict=True):
        ids = ids + spans.write(mark) + tokenizer.encode_continued(text)
    return ids
