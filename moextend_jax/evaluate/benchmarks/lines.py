"""Question and label files to their entries, each with its place: JSON lines, one JSON value, tab-separated rows.

In: a path and the `Mistakes` to add to. Out: `(file:line, entry)`; an entry that cannot be read is a mistake and is
left out. A file that cannot be read at all is raised at once.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.question import Mistakes, is_file
from moextend_jax.outside import Repeated, short, without_repeats


def first_file(home: Path, *names: str) -> Path:
    """The first of several places where a file may lie; an error that names them."""
    for name in names:
        if is_file(home / name):
            return home / name
    places = " or ".join(f"{home}/{short(name)}" for name in names)
    raise MoextendError(f"no file {places}; docs/evaluation.md says where each benchmark's files come from")


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise MoextendError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def decoded(line: bytes) -> str:
    """Raises ValueError with what is wrong, for a message."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None


def json_object(line: bytes) -> dict[str, Any]:
    """Raises ValueError with what is wrong, for a message."""
    text = decoded(line)
    try:
        entry = json.loads(text, object_pairs_hook=without_repeats)
    except Repeated:
        raise
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object {...}")
    return entry


def json_lines(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, dict[str, Any]]]:
    """One object per line; blank lines are passed over."""
    for number, line in enumerate(read(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield where, json_object(line)
            except ValueError as error:
                mistakes.add(where, str(error))


def json_value(path: Path) -> Any:
    """The one value of a JSON file."""
    encoded = read(path).removeprefix(b"\xef\xbb\xbf")
    try:
        return json.loads(encoded.decode(), object_pairs_hook=without_repeats)
    except UnicodeDecodeError as error:
        number = encoded[: error.start].count(b"\n") + 1
        raise MoextendError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise MoextendError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except Repeated as error:
        raise MoextendError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise MoextendError(f"{path}: not JSON: {error}") from None


def json_entries(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file that is one list, each with the line that it starts on."""
    found = json_value(path)
    if not isinstance(found, list) or not found:
        raise MoextendError(f"{path} is not a list [{{...}}, ...] with entries")
    text, decoder, blank = read(path).removeprefix(b"\xef\xbb\xbf").decode(), json.JSONDecoder(), " \t\r\n,"
    place, number = text.index("[") + 1, 1 + text[: text.index("[") + 1].count("\n")
    for entry in found:
        start = place
        while text[start] in blank:
            start += 1
        number += text.count("\n", place, start)
        end = decoder.raw_decode(text, start)[1]
        if isinstance(entry, dict):
            yield f"{path}:{number}", entry
        else:
            mistakes.add(f"{path}:{number}", "not an object {...}")
        number, place = number + text.count("\n", start, end), end


def listed_entries(path: Path, name: str, mistakes: Mistakes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a JSON file `{name: [...]}`, as those who made VQAv2 and TextVQA publish theirs."""
    found = json_value(path)
    listed = found.get(name) if isinstance(found, dict) else None
    if not isinstance(listed, list) or not listed:
        raise MoextendError(f'{path} is not {{"{name}": [...]}} as it is published')
    for n, entry in enumerate(listed):
        if isinstance(entry, dict):
            yield f"{path}, {name}[{n}]", entry
        else:
            mistakes.add(f"{path}, {name}[{n}]", "not an object {...}")


def rows(path: Path, mistakes: Mistakes) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a tab-separated file with a header; a cell in double quotes may hold tabs and line breaks."""

    def lines() -> Iterator[str]:
        for number, line in enumerate(read(path).removeprefix(b"\xef\xbb\xbf").splitlines(keepends=True), 1):
            try:
                yield decoded(line)
            except ValueError as error:
                mistakes.add(f"{path}:{number}", str(error))
                yield line.decode(errors="replace")

    before = csv.field_size_limit(2**31 - 1)  # pictures are cells
    try:
        reader = csv.reader(lines(), delimiter="\t")
        header = next(reader, [])
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                mistakes.add(where, str(error))
                return
            if len(row) > len(header):
                mistakes.add(where, f"{len(row)} cells, but the header has {len(header)}")
            elif row:
                yield where, dict(zip(header, row, strict=False))
    finally:
        csv.field_size_limit(before)


def value(entry: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str, mistakes: Mistakes) -> Any:
    """A field of an entry, or None and a mistake. `kind` int takes no booleans."""
    if name not in entry:
        return mistakes.add(where, f"no field {name!r}")
    found = entry[name]
    if isinstance(found, bool) or not isinstance(found, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        said = " or ".join(
            {str: "text", int: "a whole number", dict: "an object", list: "a list"}[one] for one in kinds
        )
        return mistakes.add(where, f"field {name!r} is not {said}")
    return found
