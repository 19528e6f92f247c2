"""VizWiz: LLaVA's questions for test, whose labels only the challenge's server has; VizWiz's own file for val.

In: `llava_test.jsonl` and images `test/`, or `val.json` and `val/`. Out: val's VQA accuracy over all questions and by
type of answer; the server's file for test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from moextend_jax.evaluate.benchmarks.lines import first_file, json_entries, value
from moextend_jax.evaluate.benchmarks.llava_questions import SHORT, by_id, llava_questions
from moextend_jax.evaluate.benchmarks.question import Answered, Mistakes, Question
from moextend_jax.evaluate.benchmarks.scores import Scores, accuracy_by
from moextend_jax.evaluate.benchmarks.vqa_text import agreement, normalise, normalise_m4c
from moextend_jax.evaluate.benchmarks.vqav2 import SERVER, people_of

INSUFFICIENT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read(home: Path, split: str) -> list[Question]:
    if split == "test":
        return llava_questions(first_file(home, "llava_test.jsonl"), home / "test")
    path, mistakes, questions = first_file(home, "val.json", "Annotations/val.json"), Mistakes(), []
    for where, entry in json_entries(path, mistakes):
        image = value(entry, "image", str, where, mistakes)
        text = value(entry, "question", str, where, mistakes)
        kind = value(entry, "answer_type", str, where, mistakes)
        people = people_of(entry, where, mistakes)
        if image is None or text is None or kind is None or not people:
            continue
        questions.append(
            Question(
                question_id=image,
                text=text + INSUFFICIENT + SHORT,
                image=home / "val" / image,
                where=where,
                key=by_id({"question_id": image}),
                category=kind,
                fields={"people": people},
            )
        )
    mistakes.check()
    return questions


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    """VizWiz's rule: VQA's, but people's answers are taken as they stand, and the model's is always normalised. (By
    its public evaluation code; what its server runs for test is not published.)"""
    if split == "test":
        return Scores(None, notes=[SERVER])
    points = [agreement(normalise(normalise_m4c(text)), question.fields["people"]) for question, text in answered]
    return accuracy_by("answers", [question.category for question, _ in answered], points)


def submission(answered: Sequence[Answered], home: Path, split: str) -> str:
    """`[{"image", "answer"}]`, as LLaVA writes it."""
    named = [(question.fields.get("image", question.question_id), text) for question, text in answered]
    return json.dumps([{"image": image, "answer": normalise_m4c(text)} for image, text in named])
