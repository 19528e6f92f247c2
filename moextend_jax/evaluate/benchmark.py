"""`moextend eval --benchmark`: a benchmark's questions to one model's answers, a file that grows, and its scores.

In: a model, a benchmark's name and the folder of its files. Out: OUT/NAME/MODEL/answers.jsonl in LLaVA's form,
scores.json beside it, and a table. Killed and started again it goes on with the questions that have no answer.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax import distributed
from moextend_jax.config import IMAGE, MoextendError
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.evaluate.benchmarks import answers, table
from moextend_jax.evaluate.benchmarks.command import as_json, print_scores
from moextend_jax.evaluate.benchmarks.question import Answered, Question, check_images, image_bytes
from moextend_jax.evaluate.pictures import PIXELS, QuestionPictures, as_png
from moextend_jax.evaluate.questions import prompt_of
from moextend_jax.evaluate.speak import cannot
from moextend_jax.media.image import decode_image
from moextend_jax.progress import counting
from moextend_jax.runs.askable import Askable
from moextend_jax.runs.run import write_json

EXAMPLES = 6
"""Questions that the report shows of a benchmark."""


class Exam(NamedTuple):
    """A benchmark's questions, read and checked. every: all that an answers file may hold answers to, also those beyond
    `limit`. data: the user's folder of benchmarks; None for easy_vqa."""

    name: str
    data: Path | None
    split: str | None
    limit: int | None
    every: list[Question]
    has_score: bool = True
    """Whether answers to those that are asked are scored here, not by a server or a judge."""

    @property
    def questions(self) -> list[Question]:
        """Those that are asked."""
        return self.every[: self.limit]


def read_exam(name: str, *, data: Path | None = None, split: str | None = None, limit: int | None = None) -> Exam:
    """Reads a benchmark's files, before any model is opened.

    Raises:
      MoextendError: no such benchmark or split, one that is not asked here, question files that are missing or broken
        (by line), labels without which the answers could not be scored, or images that are not there.
    """
    row = table.benchmark(name)
    if not row.asked:
        raise MoextendError(
            f"{row.title} is not asked here; `moextend eval score --benchmark {name}` scores a file of answers"
        )
    questions = table.read(name, data, split)
    scores = table.score(name, [Answered(question, "") for question in questions], data, split)  # it reads the labels
    if limit is not None and scores.headline is not None:  # which the first ones alone may not have
        scores = table.score(name, [Answered(question, "") for question in questions[:limit]], data, split)
    exam = Exam(name, data, split, limit, questions, scores.headline is not None)
    check_images(exam.questions)
    return exam


def benchmark(
    opened: Askable, exam: Exam, *, out: Path, max_new_tokens: int | None = None, template: str | None = None
) -> dict[str, Any]:
    """Answers what is not answered yet, scores, prints, and returns what scores.json holds.

    Args:
      out: the folder of all answers.
      max_new_tokens: None is the benchmark's own number.
      template: the wording that the exam's questions are in (`wordings.py`); answers to another are refused.

    Raises:
      MoextendError: images that are broken (by line, before anything runs), a model that cannot see, or a file of
        another model's answers.
    """
    name, data, split, limit, every, _ = exam
    most = max_new_tokens or table.benchmark(name).max_new_tokens
    questions = exam.questions
    if not opened.sees and any(question.image is not None for question in questions):
        raise MoextendError(f"benchmark {name} has pictures, and {cannot(opened, IMAGE)}")
    path = folder_of(out, name, split=split, model=opened.name) / "answers.jsonl"
    model_id = f"{opened.identity}-{most}"
    if template is not None:
        model_id += f"-{hashlib.sha256(template.encode()).hexdigest()[:8]}"
    speed = _answer(opened, exam, path, model_id=model_id, max_new_tokens=most)
    record: dict[str, Any] = {}
    shown: list[dict[str, Any]] = []
    if distributed.first():
        wanted = {question.key for question in questions}
        recorded = table.read_answered(name, path, questions=every, partial=True)
        answered = [answer for answer in recorded if answer.question.key in wanted]
        scores = table.score(name, answered, data, split)
        record = as_json(name, scores, questions=len(questions), answered=len(answered))
        print_scores(name, scores, record)
        record |= {"split": split or table.benchmark(name).splits[0], "limit": limit, "model": opened.name} | speed
        record |= {"model_id": model_id, "max_new_tokens": most}
        record |= {} if template is None else {"template": template}
        shown = examples(answered, scores.points)
    write_json(path.with_name("examples.json"), shown)
    write_json(path.with_name("scores.json"), record)
    return record


def examples(answered: Sequence[Answered], points: Sequence[float]) -> list[dict[str, Any]]:
    """Some questions for the report, with their pictures: the worst and the best, evenly, the earliest of each."""
    order = sorted(range(len(answered)), key=lambda n: points[n]) if points else list(range(len(answered)))
    chosen = dict.fromkeys([*order[: EXAMPLES // 2], *order[::-1][: EXAMPLES - EXAMPLES // 2]])
    records = []
    for n in chosen:
        question, text = answered[n]
        encoded = image_bytes(question)
        records.append(
            {
                "question": question.recorded,
                "answer": question.answer,
                "said": text,
                "points": points[n] if points else None,
                "image_png": None if encoded is None else _small_png(encoded, name=question.where),
            }
        )
    return records


def _small_png(encoded: bytes, *, name: str) -> str:
    picture = decode_image(encoded, name=name, upright=False)
    picture.thumbnail((PIXELS, PIXELS))
    return as_png(picture)


def folder_of(out: Path, name: str, *, split: str | None, model: str) -> Path:
    """OUT/NAME/MODEL, or NAME-SPLIT for another split than the benchmark's first."""
    default = table.benchmark(name).splits[0]
    return out / (name if split in (None, default) else f"{name}-{split}") / model


def _answer(opened: Askable, exam: Exam, path: Path, *, model_id: str, max_new_tokens: int) -> dict[str, Any]:
    """Appends answers to the exam's questions that the file at `path` lacks. Returns how many were answered now, and
    how fast."""
    first = distributed.first()
    opening = table.open_answers(exam.name, path, questions=exam.every, model_id=model_id) if first else None
    with opening or contextlib.nullcontext() as written:
        distributed.barrier(f"opened {path}")  # from here to the first batch nobody writes: all read the same
        key = table.benchmark(exam.name).key
        done = written.texts if written else answers.read_answers(path, questions=exam.every, key=key)
        left = [question for question in exam.questions if question.key not in done]
        if not left:
            return {"answered_now": 0, "questions_per_second": None}
        pictures = _pictures(opened, left)
        numbers = pictures.numbers if pictures else [()] * len(left)
        prompts = [
            prompt_of(
                question.text,
                items={IMAGE: images},
                spans=opened.config.spans({IMAGE: len(images)} if images else {}),
                tokenizer=opened.tokenizer,
                recipe=opened.recipe,
                where=question.where,
            )
            for question, images in zip(left, numbers, strict=True)
        ]
        asker = asker_of(opened, readers={IMAGE: pictures} if pictures else {})
        total = len(exam.questions)
        with counting(exam.name, total, unit="questions", done=total - len(left)) as bar:
            for completed in asker.complete(prompts, max_new_tokens=max_new_tokens):
                for index, ids in completed:
                    if written:
                        written.append(left[index], opened.tokenizer.decode(ids).strip())
                bar.add(len(completed))
            return {"answered_now": len(left), "questions_per_second": round(bar.per_second, 2)}


def _pictures(opened: Askable, questions: Sequence[Question]) -> QuestionPictures | None:
    """The pictures of some questions, all of which can be read; None of a model that does not see."""
    if opened.config.vision is None:
        return None
    medium, preparation = opened.config.media[IMAGE], opened.recipe.image_preparation
    pictures = QuestionPictures(questions, medium=medium, preparation=preparation)
    if len(pictures):
        with counting("images", len(pictures), unit="images") as bar:
            pictures.check(lambda: bar.add(1))
    return pictures
