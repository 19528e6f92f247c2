"""VQAv2: LLaVA's questions for test-dev and test, whose labels only the challenge's server has; VQA's own for val.

In: `llava_vqav2_mscoco_test-dev2015.jsonl` and images `test2015/`; for val, VQA's own question and annotation files
and `val2014/`. Out: val's accuracy over all questions and by type of answer; the server's file for the other two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.evaluate.benchmarks.lines import first_file, listed_entries, value
from moextend_jax.evaluate.benchmarks.llava_questions import SHORT, by_id, llava_questions
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Scores, accuracy_by
from moextend_jax.evaluate.benchmarks.vqa_text import normalise_m4c, vqa_accuracy

FILES = {
    "test-dev": "llava_vqav2_mscoco_test-dev2015.jsonl",
    "test": "llava_vqav2_mscoco_test2015.jsonl",
    "val": "v2_OpenEnded_mscoco_val2014_questions.json",
}
LABELS = "v2_mscoco_val2014_annotations.json"
SERVER = "the labels of this split are on the challenge's server alone: --submission FILE.json writes what it takes"


def read(home: Path, split: str) -> list[Question]:
    path = first_file(home, FILES[split])
    if split != "val":
        return llava_questions(path, home / "test2015")
    mistakes, questions = Mistakes(), []
    for where, entry in listed_entries(path, "questions", mistakes):
        question_id = value(entry, "question_id", int, where, mistakes)
        image_id = value(entry, "image_id", int, where, mistakes)
        text = value(entry, "question", str, where, mistakes)
        if question_id is None or image_id is None or text is None:
            continue
        questions.append(
            Question(
                question_id=question_id,
                text=text + SHORT,
                image=home / "val2014" / f"COCO_val2014_{image_id:012d}.jpg",
                where=where,
                key=by_id({"question_id": question_id}),
            )
        )
    mistakes.check()
    return questions


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    """Normalised as LLaVA sends it to the server, then scored as VQA's evaluation does."""
    if split != "val":
        return Scores(None, notes=[SERVER])
    path, mistakes = first_file(home, LABELS), Mistakes()
    labels = {}
    for where, entry in listed_entries(path, "annotations", mistakes):
        people = people_of(entry, where, mistakes)
        kind = value(entry, "answer_type", str, where, mistakes)
        question_id = value(entry, "question_id", int, where, mistakes)
        if people and kind is not None and question_id is not None:
            labels[question_id] = people, kind
    mistakes.check()
    for question, _ in answered:
        if question.question_id not in labels:
            mistakes.add(question.where, f"question {question.question_id} has no answers in {path}")
    mistakes.check()
    of = [labels[question.question_id] for question, _ in answered]
    points = [vqa_accuracy(normalise_m4c(text), people) for (_, text), (people, _) in zip(answered, of, strict=True)]
    return accuracy_by("answers", [kind for _, kind in of], points)


def submission(answered: Sequence[Answered], home: Path, split: str) -> str:
    """`[{"question_id", "answer"}]`. The server takes test-dev's answers among all of test's questions, the rest
    empty, so that file is read too."""
    said = {question.question_id: normalise_m4c(text) for question, text in answered}
    asked = read(home, "test") if split == "test-dev" else [question for question, _ in answered]
    return json.dumps([{"question_id": one.question_id, "answer": said.get(one.question_id, "")} for one in asked])


def people_of(entry: dict[str, Any], where: str, mistakes: Mistakes) -> list[str]:
    """The people's answers `{"answers": [{"answer": text}, ...]}` of an annotation."""
    answers = value(entry, "answers", list, where, mistakes)
    if answers is None:
        return []
    people = [one.get("answer") for one in answers if isinstance(one, dict)]
    people = [said for said in people if isinstance(said, str)]
    if not people or len(people) != len(answers):
        mistakes.add(where, "field 'answers' is not [{\"answer\": text}, ...]")
        return []
    return people
