"""ScienceQA: multiple choice, LLaVA's test questions; the letter is read from the answer as LLaVA's script does.

In: `llava_test_CQM-A.json` (right answers inside), images `images/test/`, and, if there, ScienceQA's `problems.json`.
Out: accuracy over all questions and over those with an image; with problems.json also by subject, context and grade.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.lines import first_file, json_entries, json_value, value
from moextend_jax.evaluate.benchmarks.llava_questions import LETTER, by_id
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, percent

LETTERS = ("A", "B", "C", "D", "E")
SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
GRADES = {"G1-6": range(1, 7), "G7-12": range(7, 13)}


def read(home: Path, split: str) -> list[Question]:
    path, mistakes, questions = first_file(home, "llava_test_CQM-A.json"), Mistakes(), []
    for where, entry in json_entries(path, mistakes):
        question_id = value(entry, "id", (str, int), where, mistakes)
        turns = value(entry, "conversations", list, where, mistakes)
        image = value(entry, "image", str, where, mistakes) if "image" in entry else None
        if question_id is None or turns is None:
            continue
        said = [turn.get("value") for turn in turns[:2] if isinstance(turn, dict)]
        if len(said) < 2 or not isinstance(said[0], str) or said[1] not in LETTERS:
            mistakes.add(where, f"its conversation is not a question and a letter of {', '.join(LETTERS)}")
            continue
        text = said[0].replace("<image>", "").strip() + LETTER
        questions.append(
            Question(
                question_id=question_id,
                text=text,
                prompt=f"<image>\n{text}" if image else text,
                image=home / "images" / "test" / image if image else None,
                where=where,
                key=by_id({"question_id": question_id}),
                category="image" if image else "text",
                answer=said[1],
            )
        )
    mistakes.check()
    return questions


def letter(text: str) -> str | None:
    """A bare letter; else one before a full stop and a space; else the one of a single "The answer is X" that
    something follows. No other answer names a choice: LLaVA's older script drew one at random, its present one and
    ours count it as wrong."""
    if text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 and found[0] in LETTERS else None


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    points = [float(letter(text) == question.answer) for question, text in answered]
    rows = _by_problem(answered, points, home)
    notes = [] if rows else [f"no {home / 'problems.json'}: no table by subject, context and grade"]
    pictured = [point for (question, _), point in zip(answered, points, strict=True) if question.image is not None]
    rows = [*rows, ("image", len(pictured), percent(pictured)), ("all", len(points), percent(points))]
    unread = sum(letter(text) is None for _, text in answered)
    if unread:
        notes.append(f"{unread} answers name no choice and count as wrong")
    columns = ("questions of", "questions", "accuracy %")
    return Scores(Headline("image accuracy", percent(pictured)) if pictured else None, columns, rows, points, notes)


def _by_problem(answered: Sequence[Answered], points: Sequence[float], home: Path) -> list[tuple[str, int, float]]:
    """ScienceQA's own groups; TXT and IMG overlap, NO has neither hint nor image."""
    path, mistakes = home / "problems.json", Mistakes()
    if not path.is_file():
        return []
    problems = json_value(path)
    if not isinstance(problems, dict):
        raise MoextendError(f'{path} is not {{"id": {{"subject", "grade", "hint", ...}}, ...}} as ScienceQA writes it')
    groups: dict[str, list[float]] = {name: [] for name in (*SUBJECTS, "TXT", "IMG", "NO", *GRADES)}
    for (question, _), point in zip(answered, points, strict=True):
        problem = problems.get(str(question.question_id))
        if not isinstance(problem, dict):
            mistakes.add(question.where, f"question {question.question_id} is not in {path}")
            continue
        for name in _groups(problem):
            groups[name].append(point)
    mistakes.check()
    return [(name, len(some), percent(some)) for name, some in groups.items() if some]


def _groups(problem: dict[str, Any]) -> list[str]:
    hint, image = bool(problem.get("hint")), bool(problem.get("image"))
    grade = re.fullmatch(r"grade(\d{1,9})", str(problem.get("grade")))
    return [
        *(name for name, subject in SUBJECTS.items() if problem.get("subject") == subject),
        *(["TXT"] if hint else []),
        *(["IMG"] if image else []),
        *([] if hint or image else ["NO"]),
        *(name for name, grades in GRADES.items() if grade and int(grade[1]) in grades),
    ]
