"""LLaVA's question files: lines {"question_id", "image", "text", "category"} in, questions out.

The text of these files already ends in the benchmark's instruction ("Answer the question using a single word or
phrase."), so that it is asked as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.lines import first_file, json_lines, value
from moextend_jax.evaluate.benchmarks.question import Key, Mistakes, Question

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def by_id(entry: dict[str, Any]) -> Key:
    """The key of a benchmark whose question ids are unique."""
    return (entry["question_id"],)


def by_prompt(entry: dict[str, Any]) -> Key:
    """The key of one whose ids name images: the question belongs to it."""
    return (entry["question_id"], entry["prompt"])


def reader(
    file: str, images: str, *, key: Callable[[dict[str, Any]], Key] = by_id
) -> Callable[[Path, str], list[Question]]:
    """`read` of a benchmark whose splits are one file, with its images in a folder beside it."""
    return lambda home, split: llava_questions(first_file(home, file), home / images, key=key)


def llava_questions(path: Path, images: Path, *, key: Callable[[dict[str, Any]], Key] = by_id) -> list[Question]:
    """Every line of the file.

    Raises:
      MoextendError: names lines that are no JSON, not UTF-8, or lack a field.
    """
    mistakes, questions = Mistakes(), []
    for where, entry in json_lines(path, mistakes):
        question_id = value(entry, "question_id", (str, int), where, mistakes)
        image = value(entry, "image", str, where, mistakes)
        text = value(entry, "text", str, where, mistakes)
        if question_id is None or image is None or text is None:
            continue
        try:
            of = key({"question_id": question_id, "prompt": text})
        except ValueError as error:
            mistakes.add(where, str(error))
            continue
        category = entry.get("category")
        questions.append(
            Question(
                question_id=question_id,
                text=text,
                image=images / image,
                where=where,
                key=of,
                category=category if isinstance(category, str) else "",
                fields={"image": image},
            )
        )
    mistakes.check()
    if not questions:
        raise MoextendError(f"{path} holds no questions")
    return questions
