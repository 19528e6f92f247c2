"""easy-VQA: short questions about one coloured shape, from the installed package; exact match.

In: the package `easy-vqa`; no folder is needed. Out: accuracy over all questions and by right answer.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmarks.llava_questions import by_id
from moextend_jax.evaluate.benchmarks.question import Answered, Question
from moextend_jax.evaluate.benchmarks.scores import Headline, Scores, by_group, percent


def read(home: Path, split: str) -> list[Question]:
    """In the order and with the ids of the data set `easy_vqa/questions`."""
    if importlib.util.find_spec("easy_vqa") is None:
        raise MoextendError("benchmark easy_vqa needs the package easy-vqa; pip install easy-vqa")
    import easy_vqa

    listed, paths = {
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    }[split]
    pictures = paths()
    of: dict[int, list[tuple[str, str]]] = {}
    for text, answer, picture in zip(*listed(), strict=True):
        of.setdefault(picture, []).append((text, answer))
    return [
        Question(
            question_id=f"{split}/{picture}/{n}",
            text=text,
            image=Path(pictures[picture]),
            where=f"easy_vqa {split}, picture {picture}",
            key=by_id({"question_id": f"{split}/{picture}/{n}"}),
            answer=answer,
        )
        for picture in sorted(of)
        for n, (text, answer) in enumerate(of[picture])
    ]


def plain(text: str) -> str:
    """As `evaluate.questions.accuracy` compares: case, outer spaces and a final full stop do not count."""
    return text.strip().rstrip(".").lower()


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    points = [float(plain(text) == plain(question.answer or "")) for question, text in answered]
    overall = percent(points)
    rows = [*by_group([question.answer or "" for question, _ in answered], points), ("all", len(points), overall)]
    return Scores(Headline("accuracy", overall), ("right answer", "questions", "accuracy %"), rows, points)
