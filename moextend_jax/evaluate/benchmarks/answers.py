"""LLaVA's answers file: one line per answer, appended while a model answers, read back to go on or to score.

In: questions, and texts as they come. Out: lines {"question_id", "prompt", "text", "answer_id", "model_id",
"metadata"}, which LLaVA's own scripts read too.

A line is written whole by one call, so that a kill leaves at most the last line torn; it is dropped on reading and
cut off on opening, and its question is asked again. A machine that dies loses at most the last seconds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moextend_jax.evaluate.benchmarks.lines import json_object, value
from moextend_jax.evaluate.benchmarks.lines import read as read_bytes
from moextend_jax.evaluate.benchmarks.question import Key, Mistakes, Question
from moextend_jax.folders import local

FLUSH_SECONDS = 5.0
START = b'{"question_id":'
"""Of every line, ours and LLaVA's."""


@dataclass(kw_only=True)
class Answers:
    """An answers file being written. `texts`: the answers that are in it, by the key of their question.

    Use it as a context manager, or call `close`. One process writes a file: of several hosts the first.
    """

    path: Path
    descriptor: int
    texts: dict[Key, str]
    model_id: str
    more: Callable[[Question], dict[str, Any]] | None
    flushed: float = field(default_factory=time.monotonic)

    def append(self, question: Question, text: str) -> None:
        """Writes one answer. A question that has one already is the caller's error: ValueError."""
        if question.key in self.texts:
            raise ValueError(f"question {question.key} of {question.where} has its answer in {self.path} already")
        line = _line(question, text, model_id=self.model_id, more=self.more)
        start = os.lseek(self.descriptor, 0, os.SEEK_END)
        if os.write(self.descriptor, line) != len(line):  # a full disk
            os.ftruncate(self.descriptor, start)
            raise OSError(errno.ENOSPC, "no space for another answer", str(self.path))
        self.texts[question.key] = text
        if time.monotonic() - self.flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Returns when all answers so far are on the disk."""
        os.fsync(self.descriptor)
        self.flushed = time.monotonic()

    def close(self) -> None:
        if self.descriptor >= 0:  # by a second call it may be another file's
            self.flush()
            os.close(self.descriptor)
            self.descriptor = -1

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_answers(
    path: Path,
    *,
    questions: Sequence[Question],
    key: Callable[[dict[str, Any]], Key],
    model_id: str,
    more: Callable[[Question], dict[str, Any]] | None = None,
) -> Answers:
    """Opens a new file, or one to go on with. `table.open_answers` knows `key` and `more` of each benchmark.

    Raises:
      MoextendError: the file holds other questions, other prompts, another model's answers or lines that are none;
        or another process is writing it.
    """
    from moextend_jax.lock import keep  # it imports JAX, which scoring does without

    path = local(path, what="a file of answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        keep(descriptor, path)
        encoded = read_bytes(path)
        whole = _whole(encoded)
        found = _parse(encoded, path, questions=questions, key=key)
        _same_run(found, questions, path, model_id=model_id)
        if len(whole) < len(encoded):
            os.ftruncate(descriptor, len(whole))
        elif whole and not whole.endswith(b"\n"):
            os.write(descriptor, b"\n")
    except BaseException:
        os.close(descriptor)
        raise
    texts = {of: entry["text"] for of, (_, entry) in found.items()}
    return Answers(path=path, descriptor=descriptor, texts=texts, model_id=model_id, more=more)


def read_answers(
    path: Path, *, questions: Sequence[Question], key: Callable[[dict[str, Any]], Key], strangers: bool = False
) -> dict[Key, str]:
    """Key to text of every answer in the file, which anybody may have written.

    Args:
      strangers: lines that answer none of the questions are answers too.

    Raises:
      MoextendError: names lines that are no answers, answer no question, or answer one twice.
    """
    found = _parse(read_bytes(path), path, questions=questions, key=key, strangers=strangers)
    return {of: entry["text"] for of, (_, entry) in found.items()}


def numbered(keys: Iterable[Key]) -> list[Key]:
    """Each key with how many equal ones came before it, so that all are different."""
    seen: dict[Key, int] = {}
    found = []
    for key in keys:
        seen[key] = seen.get(key, -1) + 1
        found.append((*key, seen[key]))
    return found


def _line(question: Question, text: str, *, model_id: str, more: Callable[[Question], dict[str, Any]] | None) -> bytes:
    entry: dict[str, Any] = {"question_id": question.question_id, "prompt": question.recorded, "text": text}
    # The same answer of the same model gets the same id, so that equal runs write equal files.
    identity = json.dumps([model_id, *question.key, question.recorded], default=str)
    entry |= more(question) if more else {}
    entry["answer_id"] = hashlib.sha256(identity.encode()).hexdigest()[:22]
    return json.dumps({**entry, "model_id": model_id, "metadata": {}}).encode() + b"\n"


def _whole(encoded: bytes) -> bytes:
    """The file without a torn last line; a last line that only lacks its end is whole."""
    end = encoded.rfind(b"\n") + 1
    last = encoded[end:]
    try:
        json_object(last)
    except ValueError:
        torn = last.startswith(START) or START.startswith(last)
        return encoded[:end] if torn else encoded  # what is no answer's beginning is a mistake, not ours to cut off
    return encoded


def _parse(
    encoded: bytes,
    path: Path,
    *,
    questions: Sequence[Question],
    key: Callable[[dict[str, Any]], Key],
    strangers: bool = False,
) -> dict[Key, tuple[str, dict[str, Any]]]:
    mistakes, read = Mistakes(), []
    for number, line in enumerate(_whole(encoded).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json_object(line)
        except ValueError as error:
            mistakes.add(where, str(error))
            continue
        needed = (("question_id", (str, int)), ("prompt", str), ("text", str))
        if any(value(entry, name, kind, where, mistakes) is None for name, kind in needed):
            continue
        try:
            of = key(entry)
            hash(of)
        except (ValueError, TypeError) as error:
            mistakes.add(where, str(error))
            continue
        read.append((where, entry, of))
    known = {question.key for question in questions}
    found: dict[Key, tuple[str, dict[str, Any]]] = {}
    for of, (where, entry, _) in zip(numbered(of for _, _, of in read), read, strict=True):
        if of in known:
            found[of] = where, entry
        elif of[-1] and (*of[:-1], 0) in known:
            mistakes.add(where, f"question {entry['question_id']!r} is answered a second time")
        elif strangers:
            found[of] = where, entry
        else:
            mistakes.add(where, f"no such question: {entry['question_id']!r}")
    mistakes.check()
    return found


def _same_run(
    found: dict[Key, tuple[str, dict[str, Any]]], questions: Sequence[Question], path: Path, *, model_id: str
) -> None:
    of = {question.key: question for question in questions}
    mistakes = Mistakes()
    for key, (where, entry) in found.items():
        if entry["prompt"] != of[key].recorded:
            mistakes.add(where, f"question {entry['question_id']!r} was asked with another prompt")
        elif entry.get("model_id") != model_id:
            mistakes.add(where, f"an answer of model {entry.get('model_id')!r}, not of {model_id!r}")
    mistakes.check(f"Move {path} away to answer everything anew")
