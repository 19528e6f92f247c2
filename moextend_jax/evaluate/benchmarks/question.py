"""A question of a benchmark, its picture, and the mistakes of the files it came from.

In: what a reader found in an official question file. Out: `Question`s, in the file's order; all mistakes of a file
as one message that names its lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.config import MoextendError

Key = tuple[Any, ...]
"""What an answer is matched to its question by; unique among the questions of a benchmark."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question as the model is asked it, and as LLaVA's answers file records it."""

    question_id: str | int
    """The official one. MME and TextVQA name the image here, so that questions share it: `key` is what is unique."""
    text: str
    """All that the model is asked, instruction included, after its image (LLaVA: the image, a line break, this)."""
    image: Path | bytes | None
    """A file, or the encoded picture itself (MMBench), or None for a question without a picture."""
    where: str
    """file:line of the question, for messages."""
    key: Key
    prompt: str = ""
    """What the answers file records as asked; LLaVA leaves the instruction out for MMBench. Empty means `text`."""
    category: str = ""
    answer: str | None = None
    """The right one, where the question file itself holds it."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What else the answers file records of the question, and what else its scorer needs."""

    @property
    def recorded(self) -> str:
        return self.prompt or self.text


class Answered(NamedTuple):
    question: Question
    text: str


class Mistakes:
    """Collects mistakes by place, so that a user sees several at once."""

    shown, longest = 3, 400
    """Mistakes of a message, and characters of one: what it quotes comes from the file."""

    def __init__(self):
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what if len(what) <= self.longest else what[: self.longest] + '...'}")

    def check(self, then: str = "") -> None:
        """Raises what was found: the first few in full and how many more. `then` says what to do about it."""
        if self.found:
            more = len(self.found) - self.shown
            said = "; ".join(self.found[: self.shown]) + (f"; and {more} more" if more > 0 else "")
            raise MoextendError(said + (f". {then}" if then else ""))


def check_images(questions: Sequence[Question]) -> None:
    """Raises with the lines of questions whose image file is not there."""
    mistakes = Mistakes()
    there: dict[Path, bool] = {}
    for question in questions:
        path = question.image
        if isinstance(path, Path):
            if path not in there:
                there[path] = is_file(path)
            if not there[path]:
                mistakes.add(question.where, f"no image {path}")
    mistakes.check("Download the benchmark's images to that folder; docs/evaluation.md says where from")


def image_bytes(question: Question) -> bytes | None:
    """The encoded picture, to be decoded by `media.image.decode_image`; None for a question without one."""
    if not isinstance(question.image, Path):
        return question.image
    try:
        return question.image.read_bytes()
    except (OSError, ValueError) as error:
        raise MoextendError(f"{question.where}: image {question.image} cannot be read: {error}") from None


def is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or no name at all
        return False
