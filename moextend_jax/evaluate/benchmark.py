"""`moextend eval --benchmark`: a benchmark's questions to one model's answers, a file that grows, and its scores.

In: a run, a benchmark's name and the folder of its files. Out: WORKDIR/eval/NAME/MODEL/answers.jsonl in LLaVA's form,
scores.json beside it, and a table. Killed and started again it goes on with the questions that have no answer.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.data.images import decode_image
from moextend_jax.evaluate.benchmarks import answers, table
from moextend_jax.evaluate.benchmarks.command import as_json, print_scores
from moextend_jax.evaluate.benchmarks.question import Answered, Question, image_bytes
from moextend_jax.evaluate.pictures import QuestionPictures
from moextend_jax.evaluate.questions import prompt_of
from moextend_jax.evaluate.running import asker_of, generator_of
from moextend_jax.progress import counting
from moextend_jax.runs.models_of import identity, open_model
from moextend_jax.runs.results import ANSWERING, model_row
from moextend_jax.runs.run import Run, write_json

EXAMPLES, PIXELS = 6, 256
"""Questions that the report shows of a benchmark, and the longest side of their pictures in pixels."""


def benchmark(
    run: Run,
    name: str,
    *,
    data: Path | None,
    split: str | None = None,
    model: str = "moextend",
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> dict[str, Any]:
    """Answers what is not answered yet, scores, prints, and returns what scores.json holds.

    Args:
      data: the user's folder of benchmarks; None for easy_vqa.
      limit: only the first so many questions.
      max_new_tokens: None is the benchmark's own number.

    Raises:
      MoextendError: question files or images that are missing or broken (by line, before anything runs), a model that
        cannot see, or a file of another model's answers.
    """
    most = max_new_tokens or table.benchmark(name).max_new_tokens
    every = table.read(name, data, split)
    questions = every[:limit]
    if not model_row(model).sees and any(question.image is not None for question in questions):
        raise MoextendError(f"the {model} model cannot see: benchmark {name} needs --model {' or '.join(ANSWERING)}")
    path = folder_of(run, name, split=split, model=model) / "answers.jsonl"
    model_id = f"{identity(run, model)}-{most}"
    speed = _answer(run, name, questions, every, path, model=model, model_id=model_id, max_new_tokens=most)
    record: dict[str, Any] = {}
    if distributed.first():
        wanted = {question.key for question in questions}
        recorded = table.read_answered(name, path, questions=every, partial=True)
        answered = [answer for answer in recorded if answer.question.key in wanted]
        scores = table.score(name, answered, data, split)
        record = as_json(name, scores, questions=len(questions), answered=len(answered))
        print_scores(name, scores, record)
        record |= {"split": split or table.benchmark(name).splits[0], "limit": limit, "model": model} | speed
        record |= {"model_id": model_id, "max_new_tokens": most}
        chosen_examples = examples(answered, scores.points)
    else:
        chosen_examples = []
    write_json(path.with_name("examples.json"), chosen_examples)
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
                "image_png": None if encoded is None else small_png(encoded, name=question.where),
            }
        )
    return records


def small_png(encoded: bytes, *, name: str) -> str:
    """Base64 of a picture no larger than a report shows it."""
    picture, file = decode_image(encoded, name=name), io.BytesIO()
    picture.thumbnail((PIXELS, PIXELS))
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def folder_of(run: Run, name: str, *, split: str | None, model: str) -> Path:
    """WORKDIR/eval/NAME/MODEL, or NAME-SPLIT for another split than the benchmark's first."""
    default = table.benchmark(name).splits[0]
    return run.workdir / "eval" / (name if split in (None, default) else f"{name}-{split}") / model


def _answer(
    run: Run,
    name: str,
    questions: Sequence[Question],
    every: Sequence[Question],
    path: Path,
    *,
    model: str,
    model_id: str,
    max_new_tokens: int,
) -> dict[str, Any]:
    """Appends answers to `questions` that the file at `path` lacks. `every`: all questions that it may have answers to,
    also those beyond a limit. Returns how many were answered now, and how fast."""
    assert run.config.vision is not None
    with contextlib.ExitStack() as stack:
        written = (
            stack.enter_context(table.open_answers(name, path, questions=every, model_id=model_id))
            if distributed.first()
            else None
        )
        distributed.barrier(f"opened {path}")  # from here to the first batch nobody writes: all read the same
        key = table.benchmark(name).key
        done = written.done if written else set(answers.read_answers(path, questions=every, key=key))
        left = [question for question in questions if question.key not in done]
        if not left:
            return {"answered_now": 0, "questions_per_second": None}
        pictures = QuestionPictures(
            left, size=run.config.vision.image_size, preparation=run.settings.recipe.image_preparation
        )
        if len(pictures):
            with counting("images", len(pictures), unit="images") as bar:
                pictures.check(lambda: bar.add(1))
        prompts = [
            prompt_of(
                question.text,
                images=images,
                tokenizer=run.tokenizer,
                recipe=run.settings.recipe,
                patches=run.patches,
                where=question.where,
            )
            for question, images in zip(left, pictures.numbers, strict=True)
        ]
        opened = open_model(run, model)
        asker = asker_of(run, generator_of(run, opened.model), opened.arrays, pictures=pictures)
        with counting(name, len(questions), unit="questions", done=len(questions) - len(left)) as bar:
            for completed in asker.complete(prompts, max_new_tokens=max_new_tokens):
                for index, ids in completed:
                    if written:
                        written.append(left[index], run.tokenizer.decode(ids).strip())
                bar.add(len(completed))
            return {"answered_now": len(left), "questions_per_second": round(bar.per_second, 2)}
