"""LLaVA's JSON file, one entry at a time: little memory for files of a gigabyte, and nothing that is wrong ends it.

Goes in: a file `[{"id", "image"?, "conversations"}, ...]`, where `image` may be a list and be called `images`. Comes
out: `Entry`s in order, each with the `Fault` that its own form has; what the turns say is checked where they are
encoded (`data/conversations.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.config import MoextendError
from moextend_jax.data.faults import Fault

BLOCK = 1 << 20
MOST_ENTRY = 64 << 20
"""Bytes of one entry; more means that the file is damaged (a quotation mark that is missing)."""
SHOWN = 20
"""Invalid bytes of an entry whose places its fault names."""


IMAGE_KEYS = ("image", "images")
OTHER_IMAGE_KEYS = (
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "image_url",
    "image_urls",
    "img",
    "picture",
)
OTHER_MEDIA_KEYS = ("video", "videos", "audio", "audios")
"""Keys of other people's data. Not reading them would train on questions about pictures without the pictures."""


class Entry(NamedTuple):
    """`fault` is None where the entry can be read; one that cannot has no images and no turns. `number` counts from
    0."""

    number: int
    id: str
    images: tuple[str, ...]
    turns: list[Any]
    fault: Fault | None


def read_entries(path: Path) -> Iterator[Entry]:
    """All entries in order.

    Raises:
      MoextendError: it cannot be read, is not JSON from some byte on, or is no list or an empty one.
    """
    seen: dict[str, int] = {}
    number = -1
    for number, (start, value, invalid) in enumerate(_values(path)):
        yield _entry(path, number, start, value, invalid, seen)
    if number < 0:
        raise MoextendError(f"{path} holds no entries; it must be a list of conversations")


def _entry(path: Path, number: int, start: int, value: Any, invalid: Sequence[int], seen: dict[str, int]) -> Entry:
    id = str(value.get("id", number)) if isinstance(value, dict) else str(number)
    id = id.encode(errors="replace").decode()[:200]
    where = f"{path}: entry {number} (id {id}, byte {start})"
    bad = None
    if invalid:
        places = ", ".join(map(str, invalid[:SHOWN])) + (", ..." if len(invalid) > SHOWN else "")
        bad = Fault(f"{where} is not UTF-8 at byte {places}", "encoding", id)
    elif not isinstance(value, dict) or not isinstance(value.get("conversations"), list):
        form = '{"id", "image", "conversations": [...]}'
        bad = Fault(f"{path}: entry {number} is not {form} (id {id}, byte {start})", "entry", id)
    else:
        lists = [[named] if isinstance(named, str) else named for key in IMAGE_KEYS if (named := value.get(key))]
        images = lists[0] if lists else []
        unread = [key for key in (*OTHER_MEDIA_KEYS, *(() if lists else OTHER_IMAGE_KEYS)) if value.get(key)]
        if unread:
            wanted = "only pictures are" if unread[0] in OTHER_MEDIA_KEYS else "call it image, or images for a list"
            bad = Fault(f"{where}: what {unread[0]} names is not read; {wanted}", "entry", id)
        elif lists[1:] not in ([], [images]):
            bad = Fault(f"{where}: image and images name different pictures", "entry", id)
        elif not isinstance(images, list) or not all(isinstance(name, str) for name in images):
            bad = Fault(f"{where}: image must be a path or a list of paths, not {images!r:.60}", "entry", id)
        elif not _utf8([*images, str(value.get("id", ""))]):
            bad = Fault(f"{where} has an id or an image path that is not UTF-8", "encoding", id)
        else:
            first = seen.setdefault(id, number)
            if first != number:
                bad = Fault(f"{where} has the id of entry {first}", "duplicate_id", id)
            return Entry(number, id, tuple(images), value["conversations"], bad)
    return Entry(number, id, (), [], bad)


def _utf8(texts: Sequence[str]) -> bool:
    """Whether all texts can be written as UTF-8; not where JSON spells half of a surrogate pair."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        return False
    return True


def _values(path: Path) -> Iterator[tuple[int, Any, list[int]]]:
    """The values of a JSON list: where each begins (bytes), the value, and the places of bytes that are not UTF-8."""
    decoder = json.JSONDecoder()
    with _open(path) as file:
        text = _Text(file, path)
        text.skip("\ufeff" + SPACE)
        if text.peek() != "[":
            if text.peek() == "{" and _goes_on(text, decoder):
                raise MoextendError(
                    f"{path} is JSON lines, one object after another, where a list [{{...}}, ...] is wanted; "
                    f"`jq -s . {path.name} > LIST.json` makes one"
                )
            if text.peek() in '{"tfn-0123456789':
                raise MoextendError(f"{path} holds no entries; it must be a list of conversations")
            raise MoextendError(f"{path} is not JSON: it begins with neither [ nor {{")
        text.take(1)
        text.skip(SPACE)
        if text.peek() == "]":
            text.take(1)
        else:
            while True:
                yield text.value(decoder)
                text.skip(SPACE)
                mark = text.peek()
                text.take(1)
                if mark == "]":
                    break
                if mark != ",":
                    raise MoextendError(f"{path} is not JSON: at byte {text.byte - 1} stands no , or ]")
                text.skip(SPACE)
        text.skip(SPACE)
        if text.peek():
            raise MoextendError(f"{path} is not JSON: something follows its end at byte {text.byte}")


def _goes_on(text: _Text, decoder: json.JSONDecoder) -> bool:
    """Whether another object follows the one that begins here."""
    text.value(decoder)
    text.skip(SPACE)
    return text.peek() == "{"


SPACE = " \t\r\n"


def _open(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise MoextendError(f"cannot read {path}: {error}") from error


class _Text:
    """The file as text, as much of it as is needed. Bytes that are not UTF-8 become surrogates U+DC80 to U+DCFF, which
    UTF-8 cannot spell: so bytes can be counted."""

    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.left, self.text, self.at, self.byte, self.ended = b"", "", 0, 0, False

    def more(self, size: int = BLOCK) -> bool:
        """Reads on; False at the end of the file."""
        try:
            block = self.file.read(size)
        except OSError as error:
            raise MoextendError(f"cannot read {self.path}: {error}") from error
        self.ended = not block
        data = self.left + block
        # A character may be cut at the end of a block: at most its last three bytes wait for the rest.
        keep = 0
        if block:
            for back in range(1, min(4, len(data) + 1)):
                if data[-back] >= 0xC0:
                    keep = back if back < (2 + (data[-back] >= 0xE0) + (data[-back] >= 0xF0)) else 0
                    break
                if data[-back] < 0x80:
                    break
        self.left = data[len(data) - keep :] if keep else b""
        self.text = self.text[self.at :] + data[: len(data) - keep].decode("utf-8", errors="surrogateescape")
        self.at = 0
        return bool(block)

    def peek(self) -> str:
        """The next character; "" at the end."""
        while self.at == len(self.text) and not self.ended:
            self.more()
        return self.text[self.at : self.at + 1]

    def take(self, count: int) -> str:
        taken = self.text[self.at : self.at + count]
        self.byte += len(taken.encode("utf-8", errors="surrogateescape"))
        self.at += count
        return taken

    def skip(self, characters: str) -> None:
        while (next_one := self.peek()) and next_one in characters:
            self.take(1)

    def value(self, decoder: json.JSONDecoder) -> tuple[int, Any, list[int]]:
        while True:
            self.peek()
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    break
                error = None  # a number may go on in the next block
            except (ValueError, RecursionError) as caught:
                error = caught
            if self.ended or len(self.text) - self.at > MOST_ENTRY:
                reason = str(error).split(": line")[0] if error else "it has no end"
                raise MoextendError(f"{self.path} is not JSON: the entry at byte {self.byte}: {reason}")
            self.more(max(BLOCK, len(self.text) - self.at))  # twice as much each time
        start, taken = self.byte, self.take(end - self.at)
        return start, value, [] if taken.isascii() else _invalid(taken, start)


def _invalid(taken: str, start: int) -> list[int]:
    """Places of the bytes that could not be decoded."""
    data, places, at = taken.encode("utf-8", errors="surrogateescape"), [], 0
    while True:
        try:
            data[at:].decode()
            return places
        except UnicodeDecodeError as error:
            places.append(start + at + error.start)
            at += error.end
