"""GQA: exact match on the balanced questions of testdev, as GQA's evaluation counts it on LLaVA's converted answers.

In: `llava_gqa_testdev_balanced.jsonl`, GQA's `data/testdev_balanced_questions.json` (labels) and `data/images/`.
Out: accuracy over all, binary and open questions, and by what a question is about.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.lines import first_file, json_value
from moextend_jax.evaluate.benchmarks.llava_questions import reader
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, by_group, percent

LABELS = "testdev_balanced_questions.json"


read = reader("llava_gqa_testdev_balanced.jsonl", "data/images")


def converted(text: str) -> str:
    """LLaVA's conversion: full stops at the end go, lower case; nothing else, so that "yes, it is" is not "yes"."""
    return text.rstrip(".").lower()


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    path = first_file(home, f"data/{LABELS}", f"data/questions1.2/{LABELS}", LABELS)
    labels, mistakes = json_value(path), Mistakes()
    if not isinstance(labels, dict):
        raise MoextendError(f'{path} is not {{"question id": {{"answer", "isBalanced", "types"}}, ...}}')
    counted: list[tuple[str, str, float]] = []  # structural type, semantic type, points
    points: list[float] = []
    for question, text in answered:
        label = labels.get(str(question.question_id))
        types = label.get("types") if isinstance(label, dict) else None
        if label is None:
            mistakes.add(question.where, f"question {question.question_id} is not in {path}")
        elif not isinstance(types, dict) or not isinstance(label.get("answer"), str):
            mistakes.add(f"{path}, question {question.question_id}", "no 'answer' or no 'types'")
        else:
            points.append(float(converted(text) == label["answer"]))
            if label.get("isBalanced"):
                counted.append((_text(types, "structural"), _text(types, "semantic"), points[-1]))
    mistakes.check("Question file and labels must be of the same split")
    if not counted:
        raise MoextendError(f"none of the questions is balanced in {path}: GQA counts only those")
    right = [point for _, _, point in counted]
    answer_types = ["open" if structural == "query" else "binary" for structural, _, _ in counted]
    rows = [
        *by_group(answer_types, right),
        *by_group([f"structure: {structural}" for structural, _, _ in counted], right),
        *by_group([f"about: {semantic}" for _, semantic, _ in counted], right),
        ("all", len(right), percent(right)),
    ]
    asked = {str(question.question_id) for question, _ in answered}
    left = (label for name, label in labels.items() if name not in asked)
    missed = sum(isinstance(label, dict) and bool(label.get("isBalanced")) for label in left)
    notes = [f"{missed} balanced questions of {path} have no answer here: GQA's own script refuses that"]
    return Scores(
        Headline("accuracy", percent(right)), ("questions of", "questions", "accuracy %"), rows, points,
        notes if missed else [],
    )  # fmt: skip


def submission(answered: Sequence[Answered], home: Path, split: str) -> str:
    """`[{"questionId", "prediction"}]`, what GQA's own script reads as testdev_balanced_predictions.json."""
    return json.dumps(
        [{"questionId": question.question_id, "prediction": converted(text)} for question, text in answered]
    )


def _text(types: dict[str, Any], name: str) -> str:
    found = types.get(name)
    return found if isinstance(found, str) else "none"
