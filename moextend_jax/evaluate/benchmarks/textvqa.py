"""TextVQA: questions about text in pictures, with OCR tokens in the prompt; M4C's accuracy on ten answers.

In: `llava_textvqa_val_v051_ocr.jsonl`, `TextVQA_0.5.1_val.json` (labels) and `train_images/`. Out: accuracy.

Question ids name images, and LLaVA's script finds a question again by image and by the question inside the prompt;
so do we, which is why answers to prompts without OCR tokens can be scored too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax.evaluate.benchmarks.lines import first_file, listed_entries, value
from moextend_jax.evaluate.benchmarks.llava_questions import reader
from moextend_jax.evaluate.benchmarks.question import Answered, Key, Mistakes
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, percent
from moextend_jax.evaluate.benchmarks.vqa_text import agreement, normalise_m4c

PEOPLE = 10


def key(entry: dict[str, Any]) -> Key:
    return (entry["question_id"], question_of(entry["prompt"]))


def question_of(prompt: str) -> str:
    """The bare question, lower case, of the prompts that LLaVA's script knows.

    Raises ValueError for any other.
    """
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        if found:
            return found[1].lower()
    lines = prompt.split("\n")
    if "Reference OCR token:" in prompt and len(lines) == 3:
        return lines[1 if prompt.startswith("Reference OCR token:") else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError("its prompt is not question, OCR tokens and instruction on a line each")


read = reader("llava_textvqa_val_v051_ocr.jsonl", "train_images", key=key)


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    path, mistakes = first_file(home, "TextVQA_0.5.1_val.json"), Mistakes()
    people = _labels(path, mistakes)
    for question, _ in answered:
        if question.key[:2] not in people:
            mistakes.add(question.where, f"the question is not in {path}")
    mistakes.check()
    points = [
        agreement(normalise_m4c(text), [normalise_m4c(said) for said in people[question.key[:2]]])
        for question, text in answered
    ]
    overall = percent(points)
    return Scores(
        Headline("accuracy", overall), ("questions", "accuracy %"), [(len(points), overall)], points,
    )  # fmt: skip


def _labels(path: Path, mistakes: Mistakes) -> dict[Key, list[str]]:
    people: dict[Key, list[str]] = {}
    for where, entry in listed_entries(path, "data", mistakes):
        image = value(entry, "image_id", str, where, mistakes)
        question = value(entry, "question", str, where, mistakes)
        answers = value(entry, "answers", list, where, mistakes)
        if image is None or question is None or answers is None:
            continue
        if len(answers) != PEOPLE or not all(isinstance(said, str) for said in answers):
            mistakes.add(where, f"'answers' is not {PEOPLE} texts")
            continue
        people[image, question.lower()] = answers
    mistakes.check()
    return people
