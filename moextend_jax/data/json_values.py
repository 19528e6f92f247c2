"""JSON files, one value at a time: little memory for files of a gigabyte, and every byte's place is known.

Goes in: a list `[{...}, ...]`, or JSON Lines (`{...}` after `{...}`, with or without line ends). Comes out: `Row`s.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

from moextend_jax.config import MoextendError
from moextend_jax.folders import is_url
from moextend_jax.outside import Repeated, without_repeats

BLOCK = 1 << 20
MOST_ENTRY = 64 << 20
"""Bytes of one row; more means that the file is damaged (a quotation mark that is missing)."""
SPACE = " \t\r\n"


class Row(NamedTuple):
    """A row of a file, before anything is known of what it says.

    path, place: where it stands ("line 2, byte 17", "line 3"). invalid: places in the file of bytes that are not UTF-8.
    fault: why the file's reader could not make anything of this row.
    """

    path: Path
    place: str
    value: Any
    invalid: list[int]
    fault: str = ""


def read_json(path: Path) -> Iterator[Row]:
    """Raises MoextendError where it cannot be read, or is not JSON from some byte on."""
    decoder = json.JSONDecoder(object_pairs_hook=without_repeats)
    with open_file(path) as file:
        text = _Text(file, path)
        text.skip("\ufeff" + SPACE)
        if text.peek() == "[":
            values = _list(text, decoder)
        elif text.peek() == "{":
            values = _lines(text, decoder)
        elif text.peek() in '"tfn-0123456789':  # also nothing at all
            return
        else:
            raise MoextendError(f"{path} is not JSON: it begins with neither [ nor {{")
        for value in values:
            yield Row(path, *value)


def open_file(path: Path) -> Any:
    """For reading bytes; the caller closes it."""
    try:
        file = path.open("rb")
        file = io.BufferedReader(cast(Any, file), BLOCK) if is_url(path) else file
        utf16 = file.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    except Exception as error:  # buckets have errors of their own
        raise unreadable(path, error) from error
    if utf16:  # as spreadsheets and PowerShell write
        file.close()
        raise MoextendError(f"{path} is UTF-16: save it as UTF-8")
    return file


def unreadable(path: Path, error: Exception) -> MoextendError:
    return MoextendError(f"cannot read {path}: {one_line(error)}")


def one_line(error: Exception) -> str:
    """What a library says of a file, with nothing of the file's own that a terminal would obey."""
    why = " ".join(f"{error}".split())[:300] or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in why)


Value = tuple[str, Any, list[int], str]
"""Of a `Row` all but its path."""


def _list(text: _Text, decoder: json.JSONDecoder) -> Iterator[Value]:
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
                raise MoextendError(f"{text.path} is not JSON: {text.place(-1)}: there is no , or ]")
            text.skip(SPACE)
    text.skip(SPACE)
    if text.peek():
        raise MoextendError(f"{text.path} is not JSON: something follows its end, {text.place()}")


def _lines(text: _Text, decoder: json.JSONDecoder) -> Iterator[Value]:
    while text.peek():
        yield text.value(decoder)
        text.skip(SPACE)


class _Text:
    """The file as text, as much of it as is needed. Bytes that are not UTF-8 become surrogates U+DC80 to U+DCFF, which
    UTF-8 cannot spell: so bytes can be counted."""

    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")  # blocks end inside of characters
        self.text, self.at, self.byte, self.line, self.ended = "", 0, 0, 1, False

    def place(self, on: int = 0) -> str:
        return f"line {self.line}, byte {self.byte + on}"

    def more(self, size: int = BLOCK) -> bool:
        """Reads on; False at the end of the file."""
        try:
            block = self.file.read(size)
        except Exception as error:
            raise unreadable(self.path, error) from error
        self.ended = not block
        self.text = self.text[self.at :] + self.utf8.decode(block, final=self.ended)
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
        self.line += taken.count("\n")
        self.at += count
        return taken

    def skip(self, characters: str) -> None:
        while (next_one := self.peek()) and next_one in characters:
            self.take(1)

    def value(self, decoder: json.JSONDecoder) -> Value:
        fault = ""
        while True:
            self.peek()
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or self.ended:
                    break
                error = None  # a number may go on in the next block
            except Repeated as caught:
                fault, decoder = str(caught), json.JSONDecoder()  # which finds the end of the row
                continue
            except (ValueError, RecursionError) as caught:
                error = caught
            if self.ended or len(self.text) - self.at > MOST_ENTRY:
                reason, down = str(error).split(": line")[0] if error else "it has no end", 0
                if isinstance(error, json.JSONDecodeError):
                    down = self.text.count("\n", self.at, error.pos)
                raise MoextendError(
                    f"{self.path} is not JSON: line {self.line + down}, in the entry at byte {self.byte}: {reason}"
                )
            self.more(max(BLOCK, len(self.text) - self.at))  # twice as much each time
        start, place = self.byte, self.place()
        taken = self.take(end - self.at)
        return place, value, [] if taken.isascii() else invalid_bytes(taken, start), fault


def invalid_bytes(taken: str, start: int) -> list[int]:
    """Places of the bytes that could not be decoded, in a text that was decoded with surrogates in their place."""
    data, places, at = taken.encode("utf-8", errors="surrogateescape"), [], 0
    while True:
        try:
            data[at:].decode()
            return places
        except UnicodeDecodeError as error:
            places.append(start + at + error.start)
            at += error.end
