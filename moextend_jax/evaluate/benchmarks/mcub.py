"""MCUB: what several inputs (picture, sound, video, points) have in common, four options; right by the first letter.

In: questions `MCUB-4.json` or `MCUB-3-MEDIA.json`, lists of {"id", "conversations", "modal_inputs"}, and for all of
them `MCUB-answer.json`, whose last turn is the right letter (2402.12750). Out: accuracy by the released rule, which
papers print, and beside it by a careful one. Answers alone are scored: the questions are not asked here.

Released: the answer's first character is the letter, among all lines of the answers file, so that a line whose id has
no right answer is wrong. "The answer is C" and " C" are wrong, "All of them" is right where A is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.evaluate.benchmarks.lines import first_file, json_entries, value
from moextend_jax.evaluate.benchmarks.llava_questions import by_id
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, percent

THREE = ("image-audio-video", "audio-video-pointcloud", "image-audio-pointcloud", "image-video-pointcloud")
SPLITS = ("4", *(f"3-{media}" for media in THREE))
LETTERS = ("A", "B", "C", "D")
BARE = re.compile(r"\W*([A-D])(?:\s*|[.):\]*\"'].*)", re.IGNORECASE | re.DOTALL)
"""A letter that the answer begins with: all there is, or with a mark behind it."""
ARTICLE = re.compile(r"(?:^|[.!?]\s+)A(?=\s+(?!(?:and|or|is)\b)\w)")
"""Of a sentence: "A dog"."""
LETTER = re.compile(r"\b[A-D]\b(?!['’-])")


def read(home: Path, split: str) -> list[Question]:
    right = _right_letters(first_file(home, "MCUB-answer.json", "test/MCUB-answer.json"))
    path, mistakes, questions = first_file(home, f"MCUB-{split}.json", f"test/MCUB-{split}.json"), Mistakes(), []
    for where, entry in json_entries(path, mistakes):
        question_id = value(entry, "id", (str, int), where, mistakes)
        text = _turn(entry, 0, where, mistakes)
        if question_id is None or text is None:
            continue
        key = by_id({"question_id": question_id})
        questions.append(
            Question(
                question_id=question_id, text=text, image=None, where=where, key=key, answer=right.get(question_id)
            )
        )
    mistakes.check()
    return questions


def released(text: str, letter: str | None) -> bool:
    """ModelCompose's own rule; None: nobody knows the right letter, so it is wrong."""
    return text[:1] == letter


def careful(text: str, letter: str | None) -> bool:
    """Whether the one letter that an answer names is this one."""
    return letter is not None and named_letter(text) == letter


def named_letter(text: str) -> str | None:
    """The letter that an answer begins with; else the only one that stands by itself in it, as a capital."""
    bare = BARE.fullmatch(text)
    if bare:
        return bare[1].upper()
    letters = set(LETTER.findall(ARTICLE.sub("", text)))
    return letters.pop() if len(letters) == 1 else None


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    rules = {"released": released, "careful": careful}
    points = {name: [float(rule(text, question.answer)) for question, text in answered] for name, rule in rules.items()}
    rows = [(name, len(of), int(sum(of)), percent(of)) for name, of in points.items()]
    unknown = sum(question.answer is None for question, _ in answered)
    notes = [f"{unknown} answers have an id without a right answer and count as wrong"] if unknown else []
    headline = Headline("accuracy, released rule", percent(points["released"]))
    return Scores(headline, ("rule", "answers", "right", "accuracy %"), rows, points["released"], notes)


def _right_letters(path: Path) -> dict[str | int, str]:
    mistakes, letters = Mistakes(), {}
    for where, entry in json_entries(path, mistakes):
        question_id = value(entry, "id", (str, int), where, mistakes)
        letter = _turn(entry, -1, where, mistakes)
        if letter is not None and letter not in LETTERS:
            mistakes.add(where, f"its last turn is {letter!r:.40}, not a letter of {', '.join(LETTERS)}")
        letters[question_id] = letter
    mistakes.check()
    return letters


def _turn(entry: dict[str, Any], place: int, where: str, mistakes: Mistakes) -> str | None:
    """The text of the first or the last turn."""
    turns = value(entry, "conversations", list, where, mistakes)
    if turns is None:
        return None
    try:
        text = turns[place]["value"]
    except (IndexError, KeyError, TypeError):
        text = None
    return text if isinstance(text, str) else mistakes.add(where, 'its turns are not {"from", "value"} with text')
