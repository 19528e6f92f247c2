"""The conversation of a row, in whichever of the usual spellings: keys in, turns and pictures out.

Goes in: what a row of a file says, `{key: value}`. Comes out: turns `[{"from": "system" | "human" | "gpt", "value":
text}, ...]` with an `<image>` mark where a picture stands, and the pictures in the order of the marks. What turns say
is checked where they are encoded (`data/conversations.py`); one that has no such form is passed on as it is, for that
check to name.

`SHAPES` is the table of spellings, a row each; docs/data.md shows an example of each.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moextend_jax.data.conversations import MARK
from moextend_jax.data.faults import Fault

ROLES = {
    "human": "human", "user": "human", "prompter": "human",
    "gpt": "gpt", "assistant": "gpt", "model": "gpt", "bot": "gpt", "chatgpt": "gpt",
    "system": "system", "developer": "system",
}  # fmt: skip
"""Other people's names of roles. All others (tool, function, observation, ...) stay, to be refused."""

IMAGE_KEYS = (
    ("image", "images"),
    ("image_path", "image_paths", "image_file", "image_files", "img", "img_path", "picture"),
    ("file_name", "filename"),
    ("image_url", "image_urls"),
)
"""Keys that name the pictures of a row. The first line that names any is read: an image_url beside an image is where it
came from. Keys of one line must not name different ones."""
KNOWN = frozenset(key for keys in IMAGE_KEYS for key in keys)
OTHER_MEDIA_KEYS = ("video", "videos", "audio", "audios")
"""Not reading them would train on questions about something that is not there."""

QUESTIONS = ("question", "prompt", "instruction", "query")
ANSWERS = ("answer", "completion", "response", "output")
CAPTIONS = ("caption", "text")
CAPTION_QUESTION = "Describe the image."
UNREAD_IN_TURNS = frozenset(
    ("tool_calls", "function_call", "audio", "images", "image", "video", "videos", "weight", "train")
)
"""Keys of a turn that would be missed, unless they say what happens anyway."""
READ_AS_USUAL: dict[str, tuple[Any, ...]] = {"weight": (None, 1), "train": (None, True)}


class NormalTurns(NamedTuple):
    """images: paths, URLs, bytes, `{"bytes", "path"}` or `shards.Span`s."""

    turns: list[Any]
    images: list[Any]


def normal_turns(value: Mapping[str, Any]) -> NormalTurns:
    """Raises a `Fault` that says what of the row is not read."""
    images = _images_of(value)
    for shape in SHAPES:
        key = next((key for key in shape.keys if value.get(key) not in (None, "")), None)
        if key is not None and (talk := shape.read(value, key, images)) is not None:
            break
    else:
        raise Fault(f"this is no {WANTED}; its keys are {', '.join(map(str, value))}"[:400], "entry")
    system = value.get("system")
    if isinstance(system, str) and system.strip() and not any(_from(turn) == "system" for turn in talk.turns):
        talk = talk._replace(turns=[{"from": "system", "value": system}, *talk.turns])
    return talk


WANTED = "conversation: no conversations, no messages, no question and answer, no image with a caption"


# --- pictures of a row ------------------------------------------------------------------------------------------------


def _images_of(value: Mapping[str, Any]) -> list[Any]:
    for key, item in value.items():
        if (key in OTHER_MEDIA_KEYS and item) or (key not in KNOWN and _holds_bytes(item)):
            verb = "names" if key in OTHER_MEDIA_KEYS else "holds"
            raise Fault(f"what {key} {verb} is not read; only pictures are, under image or images", "entry")
    for keys in IMAGE_KEYS:
        named = {key: _as_list(value[key]) for key in keys if value.get(key)}
        lists = list(named.values())
        if any(other != lists[0] for other in lists[1:]):
            raise Fault(f"{' and '.join(named)} name different pictures", "entry")
        if lists:
            return lists[0]
    return []


def _holds_bytes(item: Any) -> bool:
    if isinstance(item, list):
        return bool(item) and _holds_bytes(item[0])
    return isinstance(item, bytes) or (isinstance(item, dict) and isinstance(item.get("bytes"), bytes))


def _as_list(item: Any) -> list[Any]:
    item = _parsed(item)
    return item if isinstance(item, list) else [item]


def _parsed(item: Any) -> Any:
    """Tables also hold lists written as JSON."""
    if isinstance(item, str) and item.startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(item)
    return item


# --- shapes -----------------------------------------------------------------------------------------------------------


def _conversations(value: Mapping[str, Any], key: str, images: list[Any]) -> NormalTurns | None:
    """Its `<image>` marks are its own: LLaVA's form says where each picture stands."""
    turns = _parsed(value[key])
    return _talk(turns, images) if isinstance(turns, list) else None


def _messages(value: Mapping[str, Any], key: str, images: list[Any]) -> NormalTurns | None:
    talk = _conversations(value, key, images)
    return talk and _marked(talk)


def _texts(value: Mapping[str, Any], key: str, images: list[Any]) -> NormalTurns | None:
    """`[{"user", "assistant"}, ...]`, as the Cauldron has them."""
    pairs = _as_list(value[key])
    if not all(isinstance(pair, dict) and "user" in pair and "assistant" in pair for pair in pairs):
        return None
    texts = [(role, pair[name]) for pair in pairs for role, name in (("human", "user"), ("gpt", "assistant"))]
    return _marked(NormalTurns([_turn(role, text) for role, text in texts], images))


def _question(value: Mapping[str, Any], key: str, images: list[Any]) -> NormalTurns | None:
    answer = next((value[name] for name in ANSWERS if value.get(name) not in (None, "")), None)
    if answer is None:
        return None
    if isinstance(value[key], list) and isinstance(answer, list):  # messages, parted where the answer begins
        return _marked(_talk([*value[key], *answer], images))
    more = value.get("input") if key == "instruction" else None
    question = f"{value[key]}\n{more}" if isinstance(more, str) and more.strip() else value[key]
    return _marked(NormalTurns([_turn("human", _number(question)), _turn("gpt", _number(answer))], images))


def _caption(value: Mapping[str, Any], key: str, images: list[Any]) -> NormalTurns | None:
    if not images or not isinstance(value[key], str):
        return None
    return _marked(NormalTurns([_turn("human", CAPTION_QUESTION), _turn("gpt", value[key])], images))


class Shape(NamedTuple):
    """keys: the first that a row has is handed on. read: None where the row has not this shape after all."""

    keys: tuple[str, ...]
    read: Callable[[Mapping[str, Any], str, list[Any]], NormalTurns | None]


SHAPES = (
    Shape(("conversations", "conversation"), _conversations),
    Shape(("messages",), _messages),
    Shape(("texts",), _texts),
    Shape(QUESTIONS, _question),
    Shape(CAPTIONS, _caption),
)
"""In the order in which they are tried."""


def _number(text: Any) -> Any:
    """A number as text: tables have them as answers."""
    return f"{text}" if isinstance(text, int | float) and not isinstance(text, bool) else text


# --- turns ------------------------------------------------------------------------------------------------------------


def _talk(turns: Sequence[Any], images: list[Any]) -> NormalTurns:
    """Turns of either spelling; pictures that stand in them take their places among the row's."""
    in_turns: list[Any] = []
    rest = list(images)
    plain = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            plain.append(None)
            continue
        if not UNREAD_IN_TURNS.isdisjoint(turn):
            _check_read(turn)
        names = SPELLINGS[0] if turn.get("from") is not None else SPELLINGS[1]
        if turn.get(names[0]) is None or names[1] not in turn:
            plain.append({})
            continue
        role, text = turn[names[0]], turn[names[1]]
        role = ROLES.get(role.lower(), role) if isinstance(role, str) else "?"
        plain.append(_turn(role, _content(text, in_turns, rest) if isinstance(text, list) else text))
    return NormalTurns(plain, [*in_turns, *(image for image in rest if image is not TAKEN)])


def _check_read(turn: Mapping[str, Any]) -> None:
    for key in sorted(UNREAD_IN_TURNS & turn.keys()):
        if turn[key] not in READ_AS_USUAL.get(key, (None, "", [], {}, False)):
            raise Fault(f"what {key} of a turn says is not read", "entry")


SPELLINGS = (("from", "value"), ("role", "content"))
TAKEN = object()
"""In the place of a picture that a turn has shown."""


def _content(parts: list[Any], in_turns: list[Any], rest: list[Any]) -> str:
    """A list of texts and pictures as one text, a line each. Moves pictures from `rest` to `in_turns`, which part has
    none of its own."""
    lines = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif not isinstance(part, Mapping):
            raise Fault("a part of a turn is neither text nor picture", "turn")
        kind = part.get("type") or next((key for key in PART_KEYS if part.get(key) is not None), None)
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            lines.append(part["text"])
        elif kind in ("image", "image_url", "input_image"):
            lines.append(MARK)
            in_turns.append(_own(part) or _next(part.get("index"), rest))
        else:
            raise Fault(f"a part of a turn, {kind!r:.60}, is neither text nor picture", "entry")
    return "\n".join(lines)


PART_KEYS = ("image", "image_url", "text", "video", "audio")
"""One of which says what a part is that has no type."""


def _own(part: Mapping[str, Any]) -> Any:
    """The picture that a part brings with it."""
    for key in ("image", "image_url", "url", "path", "bytes", "data"):
        if part.get(key):
            return part[key]
    return None


def _next(index: Any, rest: list[Any]) -> Any:
    """The row's picture of that number, or the next that no turn has shown."""
    if not isinstance(index, int):
        index = next((n for n, image in enumerate(rest) if image is not TAKEN), -1)
    if not 0 <= index < len(rest) or rest[index] is TAKEN:
        raise Fault("it shows more pictures than it has", "marks")
    image, rest[index] = rest[index], TAKEN
    return image


def _marked(talk: NormalTurns) -> NormalTurns:
    """With marks for its pictures before the first question, where it has none at all."""
    humans = [n for n, turn in enumerate(talk.turns) if _from(turn) == "human" and isinstance(turn["value"], str)]
    if not talk.images or not humans or any(MARK in talk.turns[n]["value"] for n in humans):
        return talk
    turns, first = list(talk.turns), humans[0]
    turns[first] = _turn("human", f"{MARK}\n" * len(talk.images) + turns[first]["value"])
    return talk._replace(turns=turns)


def _turn(role: str, text: Any) -> dict[str, Any]:
    """What is no plain value becomes {}, which no check takes for text."""
    return {"from": role, "value": text if isinstance(text, str | int | float | None) else {}}


def _from(turn: Any) -> str:
    return turn.get("from", "") if isinstance(turn, Mapping) else ""
