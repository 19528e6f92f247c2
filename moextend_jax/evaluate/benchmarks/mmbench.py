"""MMBench and MMBench-CN: multiple choice from one table, each question asked once per rotation of its choices.

In: the official .tsv (pictures in base64; the rotations are rows of their own, their index 1,000,000 apart). Out: if
the table has answers (dev), accuracy of rows and circular accuracy, where a question counts if all its rotations are
right, over all and by category; and the table that MMBench's server takes.

Answers are read by LLaVA's rules. What they cannot read, the server gives to GPT to match with a choice; here such an
answer is wrong, so that scores can lie a little below the server's.
"""

from __future__ import annotations

import base64
import binascii
import csv
import dataclasses
import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.lines import first_file, rows
from moextend_jax.evaluate.benchmarks.llava_questions import LETTER
from moextend_jax.evaluate.benchmarks.question import Answered, Key, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, by_group, percent

FILES = {"en": "mmbench_dev_20230712.tsv", "cn": "mmbench_dev_cn_20231003.tsv"}
INSTRUCTIONS = {"en": LETTER, "cn": "\n请直接回答选项字母。"}
LETTERS = ("A", "B", "C", "D")
NEEDED = ("index", "question", "hint", "image", *LETTERS)
ROTATION = 1_000_000
EMPTY = "#N/A|#N/A N/A|#NA|-1.#IND|-1.#QNAN|-NaN|-nan|1.#IND|1.#QNAN|<NA>|N/A|NA|NULL|NaN|None|n/a|nan|null|"
"""Cells that pandas, which LLaVA reads the table with, takes for no value; LLaVA adds nan and none in any case."""


def read(home: Path, split: str) -> list[Question]:
    path, mistakes = first_file(home, FILES[split]), Mistakes()
    questions, lines, pictures = [], {}, {}
    for where, row in rows(path, mistakes):
        absent = [name for name in NEEDED if name not in row]
        if absent:
            mistakes.add(where, f"no column {', '.join(absent)}")
            break  # it is the header that lacks them
        if not re.fullmatch("[0-9]{1,18}", row["index"]):  # Python makes no number of thousands of digits
            mistakes.add(where, f"index {row['index']!r} is not a whole number")
            continue
        index = int(row["index"])
        options = _options(row)
        text = "\n".join([*([] if _empty(row["hint"]) else [row["hint"]]), row["question"]])
        text += "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
        if not options:
            mistakes.add(where, "no choice A")
        lines[index] = where, row["image"]
        questions.append(
            Question(
                question_id=index,
                text=text + INSTRUCTIONS[split],
                prompt=text,
                image=None,
                where=where,
                key=by_round({"question_id": index}),
                category=row.get("category", ""),
                answer=row.get("answer") if row.get("answer") in LETTERS else None,
                fields={"options": options, "row": {name: cell for name, cell in row.items() if name != "image"}},
            )
        )
    for index in lines:
        pictures[index] = _picture(index, lines, mistakes)
    mistakes.check()
    if not questions:
        raise MoextendError(f"{path} holds no questions")
    cache: dict[str, bytes] = {}  # rotations repeat the picture
    rotations = Counter(map(_circle, questions))
    for question in questions:
        question.fields["rotations"] = rotations[_circle(question)]
    whole = [_with_picture(question, pictures[int(question.question_id)], cache, mistakes) for question in questions]
    mistakes.check()
    return whole


def by_round(entry: dict[str, Any]) -> Key:
    """LLaVA's --all-rounds writes more rounds than 0, which the official tables do not need."""
    return (entry["question_id"], entry.get("round_id", 0))


def recorded(question: Question) -> dict[str, Any]:
    """What LLaVA's answers file has more than those of other benchmarks."""
    options = question.fields["options"]
    return {"round_id": 0, "options": options, "option_char": list(LETTERS[: len(options)])}


def letter(text: str, options: Sequence[str]) -> str | None:
    """LLaVA's reading: a bare letter; "the answer is X." within; or the only choice that the answer is a part of."""
    letters = LETTERS[: len(options)]
    bare = text.strip(".").strip().upper()
    if bare in letters:
        return bare
    said = text.lower()
    for one in letters:
        if f"the answer is {one.lower()}." in said:
            return one
    holding = [one for one, option in zip(letters, options, strict=True) if said in option.lower()]
    return holding[0] if len(holding) == 1 else None


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    if all(question.answer is None for question, _ in answered):
        return Scores(None, notes=["the table has no answers: --submission FILE.tsv writes what the server takes"])
    mistakes = Mistakes()
    for question, _ in answered:
        if question.answer is None:
            mistakes.add(question.where, "no answer A to D, though other rows have one")
    mistakes.check()
    said = [letter(text, question.fields["options"]) for question, text in answered]
    points = [float(one == question.answer) for one, (question, _) in zip(said, answered, strict=True)]
    circles: dict[int, list[float]] = {}
    categories: dict[int, str] = {}
    for (question, _), point in zip(answered, points, strict=True):
        circle = _circle(question)
        circles.setdefault(circle, []).append(point)
        categories.setdefault(circle, question.category)
    rotations = {_circle(question): question.fields["rotations"] for question, _ in answered}
    complete = [circle for circle, some in circles.items() if len(some) == rotations[circle]]
    whole = [float(all(circles[circle])) for circle in complete]
    table = [*by_group([categories[circle] for circle in complete], whole), ("all", len(whole), percent(whole))]
    unread = sum(one is None for one in said)
    notes = [f"accuracy of single rows, {len(points)} of them: {percent(points):.2f} %"]
    notes += [f"{unread} answers name no choice and count as wrong; the server asks GPT about those"] if unread else []
    if left := len(circles) - len(complete):
        notes.append(f"{left} questions without all of their rotations are left out of circular accuracy")
    return Scores(
        Headline("circular accuracy", percent(whole)) if whole else None,
        ("category", "questions", "circular accuracy %"),
        table,
        points,
        notes,
    )


def _circle(question: Question) -> int:
    """The same of a question and its rotations."""
    return int(question.question_id) % ROTATION


def submission(answered: Sequence[Answered], home: Path, split: str) -> str:
    """Tab-separated, with the columns of LLaVA's spreadsheet: the table without pictures, hints and categories, and a
    column `prediction` after the choices. The server reads .xlsx, .tsv and .csv."""
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    names = [name for name in answered[0].question.fields["row"] if name not in dropped]
    names.insert(6, "prediction")
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerow(names)
    for question, text in answered:
        cells = question.fields["row"] | {"prediction": text}
        writer.writerow([cells.get(name, "") for name in names])
    return file.getvalue()


def _options(row: dict[str, str]) -> list[str]:
    """Choices up to the first empty one."""
    options = []
    for one in LETTERS:
        if _empty(row[one]):
            break
        options.append(row[one])
    return options


def _empty(cell: str) -> bool:
    return cell in EMPTY.split("|") or cell.lower() in ("nan", "none")


def _picture(index: int, lines: dict[int, tuple[str, str]], mistakes: Mistakes) -> str:
    """The row's base64; VLMEvalKit's form of the table has the index of another row instead where that one has it."""
    where, picture = lines[index]
    if len(picture) <= 64 and picture.isascii() and picture.isdigit():
        if int(picture) not in lines:
            mistakes.add(where, f"its image is that of row {picture}, which is not there")
            return ""
        return lines[int(picture)][1]
    return picture


def _with_picture(question: Question, encoded: str, cache: dict[str, bytes], mistakes: Mistakes) -> Question:
    if encoded not in cache:
        try:
            cache[encoded] = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            mistakes.add(question.where, f"the image is not base64: {error}")
            return question
    if not cache[encoded]:
        mistakes.add(question.where, "no image")
    return dataclasses.replace(question, image=cache[encoded])
