"""The chat template of an exported folder: Jinja that, with its tokenizer.json, gives the ids that a model was taught.

In: the tokenizer and the recipe of a model, and the tokenizer's files as they are exported. Out: the template's text,
tried on conversations with a picture or a sound (if the model sees, if it hears), a system turn and several questions:
what cannot be written so is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from moextend_jax.checkpoints.tokenizer_json import TokenizerFiles
from moextend_jax.config import IMAGE, MoextendError, Recipe
from moextend_jax.data.conversations import encode_dialogue
from moextend_jax.data.templates import Shape, Template, script
from moextend_jax.data.tokenizer import Tokenizer
from moextend_jax.data.writing import MARK, TEMPLATES, encoder_of, prompt_of

ASSETS = Path(__file__).parents[1] / "assets" / "hf"
AFTER = "\uf8ff"
"""Stands for the space after a control token, in the middle of a template."""

TRIED: tuple[tuple[dict[str, str], ...], ...] = (
    ({"from": "human", "value": f"{MARK}\nWhat is it? "},),
    ({"from": "system", "value": "Be  brief."}, {"from": "human", "value": f"  Here {MARK} and é"}),
)
ANSWERED = (*TRIED[1], {"from": "gpt", "value": "Yes."}, {"from": "human", "value": "Why\n\nnot"})
"""Tried on our own templates only: with others transformers may split text differently between prompt and answer."""


def chat_template(tokenizer: Tokenizer, recipe: Recipe, files: TokenizerFiles) -> str:
    """The template's text.

    Raises:
      MoextendError: no text that is known here gives the ids of training.
    """
    encoder_of(tokenizer, recipe)  # says what is wrong where there is none
    name = str(prompt_of(tokenizer, recipe))
    tried = (*TRIED, ANSWERED) if name in TEMPLATES else TRIED
    if not files.tags:
        tried = _with_marks(tried, "this")
    for sounds in _sounds(files):
        mark = tokenizer.media[sounds].mark
        tried = [*tried, *_with_marks(tried, mark), *_with_marks(tried, f"{mark} {MARK}{mark}")]
    pieces = tokenizers.Tokenizer.from_str(json.dumps(files.content))

    def ids(source: str, turns: Sequence[dict[str, str]]) -> list[int]:
        """As transformers does it, with two tokens for each item."""
        text = _rendered(source, turns, tokenizer, files)
        for tags in files.tags.values():
            text = text.replace(tags["pad"], 2 * tags["pad"])
        return pieces.encode(text, add_special_tokens=False).ids

    for source in (_with_sounds(source, tokenizer, files) for source in _candidates(name, tokenizer, files)):
        if all(ids(source, turns) == _taught(turns, tokenizer, recipe) for turns in tried):
            return source
    raise MoextendError(
        f"layout hf: no chat template makes transformers give the ids that this model was taught: the tokenizer in "
        f"{tokenizer.where} puts spaces where it cannot; export with --layout released"
    )


def writes_bos(source: str, tokenizer: Tokenizer, files: TokenizerFiles) -> bool:
    bos = files.settings.get("bos_token")
    return bos is not None and _rendered(source, TRIED[0], tokenizer, files).startswith(bos)


def _candidates(name: str, tokenizer: Tokenizer, files: TokenizerFiles) -> Iterator[str]:
    turns = _asset("turns")
    if name in TEMPLATES:  # those that are no Jinja; a tokenizer makes the space at a beginning, or it is written
        for space in (" ", ""):
            yield _variables(files, space=space, legacy=tokenizer.legacy, folded=True) + turns + _asset(name)
        return
    template = tokenizer.templates[name]
    folded = script(template, Shape(1, system=True, open=True)).folded
    prefix = _variables(files, folded=folded) + turns + (_asset("pictures") if files.tags else "")
    yield prefix + template.source
    yield f"{prefix}{{%- set written %}}{template.source}{{%- endset %}}\n{_spaced(template)}"


def _sounds(files: TokenizerFiles) -> list[str]:
    """The medium of sounds, if there is one."""
    return [medium for medium in files.tags if medium != IMAGE]


def _with_sounds(source: str, tokenizer: Tokenizer, files: TokenizerFiles) -> str:
    """The same of a model that hears: sounds go through the template of pictures."""
    for sounds in _sounds(files):
        own = {"sound_tags": _together(files.tags[sounds]), "sound_mark": tokenizer.media[sounds].mark}
        source = _variables(files, **own) + _asset("sounds") + source + _asset("sounds_end")
    return source


def _with_marks(talks: Iterable[Sequence[dict[str, str]]], mark: str) -> list[list[dict[str, str]]]:
    """The conversations with something else in the place of a picture's mark."""
    return [[{**turn, "value": turn["value"].replace(MARK, mark)} for turn in turns] for turns in talks]


def _spaced(template: Template) -> str:
    """Writes `written` with a space after every control token that a text follows."""
    names = [name for name in template.control if name]
    steps = [f"replace({name!r}, {name + AFTER!r})" for name in names]
    steps += [f"replace({AFTER + name!r}, {name!r})" for name in names]
    return "{{- (written | " + " | ".join(steps) + f").rstrip({AFTER!r}) | replace({AFTER!r}, ' ') }}}}"


def _variables(files: TokenizerFiles, **more: Any) -> str:
    values = {"tags": _together(files.tags.get(IMAGE, {})), **more}
    return "".join(f"{{%- set {name} = {_literal(value)} %}}\n" for name, value in values.items())


def _together(tags: Mapping[str, str]) -> str:
    return "".join(tags.get(name, "") for name in ("start", "pad", "end"))


def _literal(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _asset(name: str) -> str:
    return (ASSETS / f"{name}.jinja").read_text(encoding="utf-8")


def _taught(turns: Sequence[dict[str, str]], tokenizer: Tokenizer, recipe: Recipe) -> list[int]:
    marks = {name: sum(turn["value"].count(marked.mark) for turn in turns) for name, marked in tokenizer.media.items()}
    items = {name: [2] * count for name, count in marks.items() if count}
    return encode_dialogue(turns, items=items, tokenizer=tokenizer, recipe=recipe).ids_L.tolist()


def _rendered(source: str, turns: Sequence[dict[str, str]], tokenizer: Tokenizer, files: TokenizerFiles) -> str:
    names = {"system": "system", "human": "user", "gpt": "assistant"}
    roles = {
        name: value for name, value in files.settings.items() if name.endswith("_token") and isinstance(value, str)
    }
    template = Template(source=source, where=tokenizer.where, roles=roles, control={})
    return template.render([{"role": names[turn["from"]], "content": turn["value"]} for turn in turns], open=True)
