"""A talk to token ids, as `recipe.prompt` says: Mixtral's own way, the released code's, or a Jinja template's.

Goes in: a `Talk`, and the positions that an image takes (patches). Comes out: `Part`s, ids that follow one another.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

from moextend_jax.config import MoextendError, Recipe
from moextend_jax.data.pieces import Control
from moextend_jax.data.templates import Place, Script, Shape, Template, script
from moextend_jax.data.tokenizer import Tokenizer

MARK = "<image>"


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
            "chat_template.jinja there, or set recipe.prompt to mixtral"
        )
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name not in tokenizer.templates:
        raise MoextendError(f"recipe.prompt = {name} needs tokens that the tokenizer in {tokenizer.where} has not")
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


def _mixtral(talk: Talk, tokenizer: Tokenizer, patches: int) -> list[Part]:
    parts = [Part([*tokenizer.prefix], False)]
    for question, answer in talk.folded:
        text = f"[INST] {question.strip()} [/INST]"
        parts.append(Part(_with_images(text, tokenizer, patches, continued=False), False))
        if answer is not None:
            parts.append(Part([*tokenizer.encode(answer.strip()), tokenizer.eos], True))
    return parts


def _released(talk: Talk, tokenizer: Tokenizer, patches: int) -> list[Part]:
    parts = [Part([*tokenizer.prefix], True)]
    for question, answer in talk.folded:
        texts = ("[INST]", question, "[/INST]")
        parts.append(Part([id for text in texts for id in released_text(text, tokenizer, patches)], False))
        if answer is None:
            return parts
        parts.append(Part(released_text(answer, tokenizer, patches), True))
    return [*parts, Part([tokenizer.eos], True)]


def released_text(text: str, tokenizer: Tokenizer, patches: int) -> list[int]:
    """A space goes before the text, and with `legacy` once more before it and after every special token."""
    special = {MARK: _span(tokenizer, patches), "<s>": [*tokenizer.prefix], "</s>": [tokenizer.eos], "<unk>": [0]}
    encode = tokenizer.encode if tokenizer.legacy else tokenizer.encode_continued
    chunks = [chunk for chunk in re.split("(<image>|<s>|</s>|<unk>)", f" {text}") if chunk]
    if not tokenizer.legacy and chunks[0] == " " and len(chunks) > 1:
        chunks = chunks[1:]
    return [id for chunk in chunks for id in (special[chunk] if chunk in special else encode(chunk))]


def _by_template(template: Template, talk: Talk, tokenizer: Tokenizer, patches: int) -> list[Part]:
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
                ids += _with_images(text, tokenizer, patches, continued=continued)
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


Encoder = Callable[[Talk, Tokenizer, int], list[Part]]
TEMPLATES: dict[str, Encoder] = {"mixtral": _mixtral, "released": _released}
"""Those that no Jinja template writes."""


def _with_images(text: str, tokenizer: Tokenizer, patches: int, *, continued: bool) -> list[int]:
    # A space before an image would be a token of its own that says nothing.
    first, *rest = re.sub(f" *{MARK}", MARK, text).split(MARK) if MARK in text else [text]
    ids = tokenizer.encode_continued(first) if continued else tokenizer.encode(first)
    for text in rest:
        ids = ids + _span(tokenizer, patches) + tokenizer.encode_continued(text)
    return ids


def _span(tokenizer: Tokenizer, patches: int) -> list[int]:
    return [tokenizer.tags.start, *[tokenizer.tags.pad] * patches, tokenizer.tags.end]
