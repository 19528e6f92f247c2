"""easy-VQA: short questions about one coloured shape, from the installed package; exact match.

In: the package `easy-vqa`; no folder is needed. Out: accuracy over all questions and by right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moextend_jax.data.easy_vqa import asked, pictures
from moextend_jax.evaluate.benchmarks.llava_questions import by_id
from moextend_jax.evaluate.benchmarks.question import Answered, Question
from moextend_jax.evaluate.benchmarks.scores import Scores, accuracy_by, are_right


def read(home: Path, split: str) -> list[Question]:
    """In the order and with the ids of the data set `easy_vqa/questions`."""
    of, files = asked(split, of="easy_vqa"), pictures(split)
    return [
        Question(
            question_id=f"{split}/{picture}/{n}",
            text=text,
            image=Path(files[picture]),
            where=f"easy_vqa {split}, picture {picture}",
            key=by_id({"question_id": f"{split}/{picture}/{n}"}),
            answer=answer,
        )
        for picture in sorted(of)
        for n, (text, answer) in enumerate(of[picture])
    ]


def score(answered: Sequence[Answered], home: Path, split: str) -> Scores:
    right = [question.answer or "" for question, _ in answered]
    points = [float(is_right) for is_right in are_right(right, [text for _, text in answered])]
    return accuracy_by("right answer", right, points)
