"""`moextend eval score`: scores a file of answers, ours or any in LLaVA's form.

In: a benchmark's name, its folder, and the answers. Out: a table or one JSON object; on request the file that the
benchmark's server takes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table

from moextend_jax.evaluate.benchmarks import table
from moextend_jax.evaluate.benchmarks.scores import Scores
from moextend_jax.options import OneOf
from moextend_jax.terminal import console, quoted

MODELS = ("MoExtend", "LLaVA-1.5-13B")
PUBLISHED = {
    "scienceqa": (73.8, 71.6),  # image questions
    "textvqa": (58.7, 61.3),
    "vqav2": (76.6, 80.0),  # test-dev
    "pope": (85.5, 85.9),  # mean F1
    "mmvet": (37.1, 35.4),
    "mmbench": (67.8, 67.7),
    "mmbench_cn": (61.5, 63.6),
    "mme": (1710.1, 1531.3),  # LLaVA's is perception alone; of what MoExtend's is the sum is not known here
}
"""What the method's paper (arXiv 2408.03511) prints of `MODELS`, in its tables on image question answering and on
multimodal benchmarks. It leaves GQA, VizWiz, LLaVA-Bench and easy-VQA out."""


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    benchmark: Annotated[str, OneOf(tuple(table.BENCHMARKS))]
    """its name"""
    answers: Path
    """answers.jsonl, one line per answer as LLaVA writes them"""
    data: Path | None = None
    """folder of the official files, as LLaVA's playground/data/eval"""
    split: str | None = None
    """else the benchmark's default"""
    partial: bool = False
    """score the questions that have an answer"""
    submission: Path | None = None
    """file to write what the benchmark's server or judge takes"""
    json: bool = False
    """one JSON object instead of the table"""


def score(options: ScoreOptions) -> None:
    """Scores a file of answers by the benchmark's own rule."""
    name = options.benchmark
    questions = table.read(name, options.data, options.split)
    answered = table.read_answered(name, options.answers, questions=questions, partial=options.partial)
    if options.submission:
        text = table.submission(name, answered, options.data, options.split)
        options.submission.write_text(text, encoding="utf-8", errors="replace")
    scores = table.score(name, answered, options.data, options.split)
    asked = {question.key for question in questions}
    count = sum(question.key in asked for question, _ in answered)
    record = as_json(name, scores, questions=len(questions), answered=count)
    if options.submission:
        record["submission"] = str(options.submission)
    if options.json:
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        print_scores(name, scores, record)


def as_json(name: str, scores: Scores, *, questions: int, answered: int) -> dict[str, Any]:
    """What `--json` prints, and what a report keeps of a benchmark."""
    return {
        "benchmark": name,
        "questions": questions,
        "answered": answered,
        "headline": scores.headline._asdict() if scores.headline else None,
        "published": dict(zip(MODELS, PUBLISHED.get(name, ()), strict=False)),
        "rows": [dict(zip(scores.columns, row, strict=True)) for row in scores.rows],
        "notes": list(scores.notes),
    }


def print_scores(name: str, scores: Scores, record: dict[str, Any]) -> None:
    out = console()
    title = f"{table.benchmark(name).title}: {record['answered']} of {record['questions']} questions answered"
    out.print(title, markup=False)
    if scores.rows:
        shown = Table()
        for n, column in enumerate(scores.columns):
            number = all(not isinstance(row[n], str) or not row[n] for row in scores.rows)
            shown.add_column(column, justify="right" if number else "left")
        for row in scores.rows:
            shown.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else quoted(str(cell)) for cell in row))
        out.print(shown)
    if scores.headline:
        said = f"{scores.headline.name} {scores.headline.value:.2f}"
        others = ", ".join(f"{model} {number}" for model, number in record["published"].items())
        out.print(said + (f"; published: {others}" if others else ""), markup=False)
    for note in scores.notes:
        out.print(note, markup=False)
    if record.get("submission"):
        out.print(f"wrote {record['submission']}", markup=False)
