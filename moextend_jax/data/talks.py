"""The conversation of a row, in whichever of the usual spellings: keys in, turns and items out.

Goes in: what a row of a file says, `{key: value}`. Comes out: turns `[{"from": "system" | "human" | "gpt", "value":
text}, ...]` with a mark where an item stands (`<image>`, `<audio>`, `<features:depth>`), and the items, those of one
mark in the order of the marks. Which media a run has is asked where rows are read. What turns say is checked where they
are encoded (`data/conversations.py`); one that has no such form is passed on as it is, for that check to name.

`SHAPES` is the table of spellings, a row each; docs/data.md shows an example of each.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from moextend_jax.config import MediumKind
from moextend_jax.faults import Fault
from moextend_jax.media import KINDS, kind_of_file, mark_of, plurals
from moextend_jax.outside import Repeated, without_repeats

ROLES = {
    "human": "human", "user": "human", "prompter": "human",
    "gpt": "gpt", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Other people's names of roles. All others (tool, function, observation, ...) stay, to be refused."""


FILE_NAMES = ("file_name", "filename")
"""Keys that do not say of which kind a file is; its suffix does: a picture unless it is that of another kind."""


def _keys(kind: MediumKind) -> tuple[tuple[str, ...], ...]:
    paths = tuple(f"{kind}_{of}" for of in ("path", "paths", "file", "files", "file_name", "file_names"))
    if kind != "image":
        return plurals(kind), paths, FILE_NAMES
    return plurals(kind), (*paths, "img", "img_path", "picture"), FILE_NAMES, ("image_url", "image_urls")


ITEM_KEYS: dict[MediumKind, tuple[tuple[str, ...], ...]] = {kind: _keys(kind) for kind in KINDS}
"""Keys that name the items of a row, by their kind. The first line that names any is read: an image_url beside an image
is where it came from. Keys of one line must not name different ones. Items of a medium that is not called as its kind
stand under its name: `{"audio": {"speech": "a.wav"}}`."""
KNOWN = frozenset(key for lines in ITEM_KEYS.values() for keys in lines for key in keys)
OTHER_KEYS = KNOWN.difference(FILE_NAMES)
PLAIN_KEYS = tuple(sorted(key for key in KNOWN - {*plurals("features"), "filename"} if "_" not in key))
"""Those that no usual column of a text alone is like."""
FILE_KEYS = ("bytes", "path", "url", "data", "array")
"""Keys of an object that is one file; any other object has items by the names of their media."""

QUESTIONS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "completion", "response", "output")
MORE = ("input", "context")
"""What an instruction is about, on a line of its own below it."""
SYSTEMS = ("system", "system_prompt")
UNREAD = ("context", "choices", "options", "hint", "passage", "history", "system_prompt")
"""Keys whose texts must stand in the turns: without them it would be another conversation."""
CAPTIONS = ("caption", "text")
CAPTION_QUESTION = {"audio": "Describe the sound.", "features": "Describe this."}
"""By the kind of the row's first item: `Describe the image.` unless it says another."""
TRANSCRIPTS = ("transcription", "transcript", "sentence")
UNREAD_IN_TURNS = frozenset(
    ("tool_calls", "function_call", "weight", "train", *(key for lines in ITEM_KEYS.values() for key in lines[0]))
)
"""Keys of a turn that are not read: an error, unless they say what is done anyway (`READ_AS_USUAL`)."""
READ_AS_USUAL: dict[str, tuple[Any, ...]] = {"weight": (None, 1), "train": (None, True)}


class Item(NamedTuple):
    """file: a path, a URL, bytes, `{"bytes", "path"}` or a `shards.Span`. medium: its name, the kind's unless the data
    say another."""

    kind: MediumKind
    medium: str
    file: Any

    @property
    def mark(self) -> str:
        return mark_of(self.medium, self.kind)


class NormalTurns(NamedTuple):
    turns: list[Any]
    items: list[Item]


def normal_turns(value: Mapping[str, Any]) -> NormalTurns:
    """Raises a `Fault` that says what of the row is not read."""
    # What pandas has for an empty cell.
    value = {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in value.items()}
    items = _items_of(value)
    for shape in SHAPES:
        key = next((key for key in shape.keys if value.get(key) not in (None, "")), None)
        if key is not None and (talk := shape.read(value, key, items)) is not None:
            break
    else:
        raise _shapeless(value, items)
    if not talk.items:  # else a picture whose key is misspelt would be lost, and the question asked without it
        for name, content in value.items():
            like = _like(f"{name}", PLAIN_KEYS) if content and not isinstance(content, int | float) else ""
            if like and _misspells(f"{name}", like):
                raise Fault(f"{name} is not read; is it meant as {like}?", "entry")
    systems = [text for name in SYSTEMS if isinstance(text := value.get(name), str) and text.strip()]
    if systems and not any(_from(turn) == "system" for turn in talk.turns):
        talk = talk._replace(turns=[{"from": "system", "value": systems[0]}, *talk.turns])
    _check_said(value, key, talk.turns)
    return talk


WANTED = "conversation: no conversations, no messages, no question and answer, no image with a caption"


def _shapeless(value: Mapping[str, Any], items: list[Item]) -> Fault:
    """What is wrong with a row that has none of `SHAPES`: a cell that was left empty, or keys of other names."""
    pair = [[key for key in keys if key in value] for keys in (QUESTIONS, ANSWERS)]
    for key in [key for keys in pair for key in keys] if all(pair) else CAPTIONS if items else ():
        if key in value and value[key] in (None, ""):
            return Fault(f"its {key} is empty", "entry" if key in QUESTIONS else "empty_answer")
    names = [key for shape in SHAPES for key in shape.keys] + [*ANSWERS, *KNOWN]
    meant = {key: like for key in map(str, value) if (like := _like(key, tuple(names)))}
    hints = "".join(f"; is {key} meant as {like}?" for key, like in meant.items())
    return Fault(f"this is no {WANTED}; its keys are {', '.join(map(str, value))}"[:400] + hints[:200], "entry")


@functools.lru_cache(maxsize=1024)
def _like(key: str, names: tuple[str, ...]) -> str:
    """The name that a key misspells, or ""."""
    if key in names or "_" in key:  # image_id is no image
        return ""
    return next(iter(get_close_matches(key.strip().lower(), names, n=1, cutoff=0.8)), "")


def _misspells(key: str, name: str) -> bool:
    """Whether one letter more or less, or letters in another order, make the name; another letter makes another word:
    round is no sound, audit no audio."""
    key = key.strip().lower()
    return len(key) != len(name) or sorted(key) == sorted(name)


# --- items of a row ---------------------------------------------------------------------------------------------------


def _items_of(value: Mapping[str, Any]) -> list[Item]:
    for key, content in value.items():
        if key not in KNOWN and _holds_bytes(content):
            raise Fault(f"what {key} holds is not read; only what {', '.join(ITEM_KEYS)} hold is", "entry")
    # Beside an item of another key a file's name is no further sound.
    beside = any(map(value.get, FILE_NAMES)) and any(map(value.get, OTHER_KEYS))
    return [item for kind in ITEM_KEYS for item in _of_kind(value, kind, beside=beside)]


def _of_kind(value: Mapping[str, Any], kind: MediumKind, *, beside: bool) -> list[Item]:
    for keys in ITEM_KEYS[kind]:
        if keys is FILE_NAMES and beside and kind != "image":
            continue
        named = {key: _named(value[key], kind) for key in keys if value.get(key)}
        if keys is FILE_NAMES:
            named = {key: [item for item in of if kind_of_file(item.file) == kind] for key, of in named.items()}
        lists = [items for items in named.values() if items]
        if any(other != lists[0] for other in lists[1:]):
            noun = "pictures" if kind == "image" else "items"
            raise Fault(f"{' and '.join(named)} name different {noun}", "entry")
        if lists:
            return lists[0]
    return []


def _named(content: Any, kind: MediumKind) -> list[Item]:
    """What a key of the kind says: a file, a list of files, or either by the names of media."""
    content = _parsed(content)
    if isinstance(content, dict) and not any(key in content for key in FILE_KEYS):
        by_medium = {f"{name}": _as_list(files) for name, files in content.items() if files}
        return [Item(kind, name, file) for name, files in by_medium.items() for file in files]
    return [Item(kind, kind, file) for file in _as_list(content)]


def _holds_bytes(item: Any) -> bool:
    if isinstance(item, list):
        return bool(item) and _holds_bytes(item[0])
    return isinstance(item, bytes) or (isinstance(item, dict) and isinstance(item.get("bytes"), bytes))


def _as_list(item: Any) -> list[Any]:
    item = _parsed(item)
    return item if isinstance(item, list) else [item]


def _parsed(item: Any) -> Any:
    """Tables also hold lists and objects written as JSON."""
    if isinstance(item, str) and item.startswith(("[", "{")):
        try:
            return json.loads(item, object_pairs_hook=without_repeats)
        except Repeated as error:
            raise Fault(f"{error}, in {item:.60}", "entry") from error
        except (ValueError, RecursionError):
            return item
    return item


# --- shapes -----------------------------------------------------------------------------------------------------------


def _conversations(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    """Its marks are its own: LLaVA's form says where each item stands."""
    turns = _parsed(value[key])
    return _talk(turns, items) if isinstance(turns, list) else None


def _messages(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    talk = _conversations(value, key, items)
    return talk and _marked(talk)


def _texts(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    """`[{"user", "assistant"}, ...]`, as the Cauldron has them."""
    pairs = _as_list(value[key])
    if not all(isinstance(pair, dict) and "user" in pair and "assistant" in pair for pair in pairs):
        return None
    texts = [(role, pair[name]) for pair in pairs for role, name in (("human", "user"), ("gpt", "assistant"))]
    return _marked(NormalTurns([_turn(role, text) for role, text in texts], items))


def _question(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    answer = next((value[name] for name in ANSWERS if value.get(name) not in (None, "")), None)
    if answer is None:
        return None
    if isinstance(value[key], list) and isinstance(answer, list):  # messages, parted where the answer begins
        return _marked(_talk([*value[key], *answer], items))
    names = MORE if key == "instruction" else ()
    about = {name: _number(value[name]) for name in names if value.get(name) not in (None, "", [], {})}
    for name, text in ((key, value[key]), *about.items(), ("answer", answer)):
        if isinstance(text, list | dict) or (name in about and not isinstance(text, str)):
            raise Fault(f"its {name} must be text, not {text!r:.60}", "entry")
    question = value[key]
    for name, text in about.items():  # a context may stand in the instruction already
        if text.strip() and not (name == "context" and _stands(text, _blanks_alike(f"{question}"))):
            question = f"{question}\n{text}"
    earlier = _parsed(value.get("history")) or []
    if not isinstance(earlier, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in earlier):
        raise Fault(f"its history must be pairs of a question and its answer, not {earlier!r:.60}", "entry")
    texts = [text for pair in (*earlier, (question, answer)) for text in pair]
    turns = [_turn(role, _number(text)) for role, text in zip(("human", "gpt") * len(texts), texts, strict=False)]
    return _marked(NormalTurns(turns, items))


def _transcript(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    if not items or items[0].kind != "audio" or not isinstance(value[key], str):
        return None
    return _marked(NormalTurns([_turn("human", "What is said?"), _turn("gpt", value[key])], items))


def _caption(value: Mapping[str, Any], key: str, items: list[Item]) -> NormalTurns | None:
    if not items or not isinstance(value[key], str):
        return None
    question = CAPTION_QUESTION.get(items[0].kind, f"Describe the {items[0].kind}.")
    return _marked(NormalTurns([_turn("human", question), _turn("gpt", value[key])], items))


class Shape(NamedTuple):
    """keys: the first that a row has is passed to `read`. read: gives None if the row does not have this shape."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, list[Item]], NormalTurns | None]


SHAPES = (
    Shape(("conversations", "conversation"), _conversations),
    Shape(("messages",), _messages),
    Shape(("texts",), _texts),
    Shape(QUESTIONS, _question),
    Shape(TRANSCRIPTS, _transcript),
    Shape(CAPTIONS, _caption),
)
"""In the order in which they are tried."""


def _number(text: Any) -> Any:
    """A number as text: tables have them as answers."""
    return f"{text}" if isinstance(text, int | float) and not isinstance(text, bool) else text


# --- what is not read -------------------------------------------------------------------------------------------------


def _check_said(value: Mapping[str, Any], key: str, turns: Sequence[Any]) -> None:
    """Raises the `Fault` of a row that says more than its turns, which were read from `key`."""
    names = _unread_beside(key)
    if all(value.get(name) in (None, "") for name in names):
        return
    texts = [(_from(turn), f"{turn.get('value')}") for turn in turns if isinstance(turn, Mapping)]
    said = _blanks_alike("\n".join(text for _, text in texts))
    asked = _blanks_alike("\n".join(text for role, text in texts if role != "gpt"))
    for name in names:
        if not _stands(value.get(name), said if name == "history" else asked):
            mend = f"leave out that or the {key}" if name in QUESTIONS else f"write it into the {key}, or leave it out"
            raise Fault(f"what its {name} says is not read; {mend}", "entry")


@functools.cache
def _unread_beside(key: str) -> tuple[str, ...]:
    read = (key, *(MORE if key == "instruction" else ()))
    names = (*UNREAD, *((*QUESTIONS, "input") if key in QUESTIONS else ()))
    return tuple(name for name in names if name not in read)


def _stands(content: Any, said: str) -> bool:
    """Whether a text has what a cell says, or every part of it; an option "a" is not in "what"."""
    text = _blanks_alike(f"{content}")
    if content is None or not text or (text in said and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said, re.ASCII)):
        return True
    parts = _parsed(content)
    parts = parts.values() if isinstance(parts, dict) else parts
    return isinstance(parts, Iterable) and not isinstance(parts, str) and all(_stands(part, said) for part in parts)


def _blanks_alike(text: str) -> str:
    return " ".join(text.split())


# --- turns ------------------------------------------------------------------------------------------------------------


def _talk(turns: Sequence[Any], items: list[Item]) -> NormalTurns:
    """Turns of either spelling; items that stand in them take their places among the row's."""
    in_turns: list[Item] = []
    placed: set[int] = set()
    plain = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            plain.append(None)
            continue
        for key in sorted(UNREAD_IN_TURNS & turn.keys()):
            if turn[key] not in READ_AS_USUAL.get(key, (None, "", [], {}, False)):
                raise Fault(f"what {key} of a turn says is not read", "entry")
        names = SPELLINGS[0] if turn.get("from") is not None else SPELLINGS[1]
        if turn.get(names[0]) is None or names[1] not in turn:
            plain.append({})
            continue
        role, text = turn[names[0]], turn[names[1]]
        role = ROLES.get(role.lower(), role) if isinstance(role, str) else "?"
        plain.append(_turn(role, _content(text, in_turns, items, placed) if isinstance(text, list) else text))
    return NormalTurns(plain, [*in_turns, *(item for n, item in enumerate(items) if n not in placed)])


SPELLINGS = (("from", "value"), ("role", "content"))


def _content(parts: list[Any], in_turns: list[Item], items: list[Item], placed: set[int]) -> str:
    """A list of texts and items as one text, a line each. Its items go into `in_turns`. A part without an own item
    takes one of the row's `items`, whose number goes into `placed`."""
    lines = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif not isinstance(part, Mapping):
            raise Fault("a part of a turn is neither text nor picture", "turn")
        kind = part.get("type") or next((key for key in PART_KEYS if part.get(key) is not None), None)
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif isinstance(kind, str) and kind in PARTS:
            own = _own(part, PARTS[kind]) or [_next(part.get("index"), PARTS[kind], items, placed)]
            lines += [item.mark for item in own]
            in_turns += own
        else:
            raise Fault(f"a part of a turn, {kind!r:.60}, is neither text nor {', '.join(KINDS)}", "entry")
    return "\n".join(lines)


PARTS: dict[str, MediumKind] = {
    name: kind for kind in KINDS for name in (kind, f"{kind}_url", f"input_{kind}")
}  # fmt: skip
"""Types of parts that are items."""
PART_KEYS = (*PARTS, "text")
"""One of these keys says what a part without a type is."""


def _own(part: Mapping[str, Any], kind: MediumKind) -> list[Item]:
    """The items that a part brings with it; usually one."""
    for key in (kind, f"{kind}_url", f"input_{kind}", "url", "path", "bytes", "data"):
        if part.get(key):
            return _named(part[key], kind)
    return []


def _next(index: Any, kind: MediumKind, items: list[Item], placed: set[int]) -> Item:
    """The row's item of that kind and number, or the next that no turn has shown."""
    numbers = [n for n, item in enumerate(items) if item.kind == kind]
    if not isinstance(index, int):
        index = next((at for at, n in enumerate(numbers) if n not in placed), -1)
    if not 0 <= index < len(numbers) or numbers[index] in placed:
        raise Fault(f"it shows more {'pictures' if kind == 'image' else kind} than it has", "marks")
    placed.add(numbers[index])
    return items[numbers[index]]


def _marked(talk: NormalTurns) -> NormalTurns:
    """With marks before the first question for the items of each medium whose mark stands in no question."""
    humans = [n for n, turn in enumerate(talk.turns) if _from(turn) == "human" and isinstance(turn["value"], str)]
    marks = [item.mark for item in talk.items]
    missing = [mark for mark in marks if not any(mark in talk.turns[n]["value"] for n in humans)]
    if not missing or not humans:
        return talk
    turns, first = list(talk.turns), humans[0]
    turns[first] = _turn("human", "".join(f"{mark}\n" for mark in missing) + turns[first]["value"])
    return talk._replace(turns=turns)


def _turn(role: str, text: Any) -> dict[str, Any]:
    """What is no plain value becomes {}, which no check takes for text."""
    return {"from": role, "value": text if isinstance(text, str | int | float | None) else {}}


def _from(turn: Any) -> str:
    return turn.get("from", "") if isinstance(turn, Mapping) else ""
