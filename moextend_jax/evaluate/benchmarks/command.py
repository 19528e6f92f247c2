"""`moextend eval score`: scores a file of answers, ours or any in LLaVA's form.

In: a benchmark's name, its folder, and the answers. Out: a table or one JSON object; on request the file that the
benchmark's server takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from moextend_jax.evaluate.benchmarks import table
from moextend_jax.evaluate.benchmarks.published import published
from moextend_jax.evaluate.benchmarks.scores import Scores
from moextend_jax.terminal import Parser, console


def score_main(arguments: Sequence[str]) -> int:
    """Exit code 0; mistakes are raised."""
    parser = Parser(prog="moextend eval score", description="scores a file of answers by the benchmark's own rule")
    parser.add_argument("--benchmark", required=True, help=", ".join(table.BENCHMARKS))
    parser.add_argument("--answers", required=True, help="answers.jsonl, one line per answer as LLaVA writes them")
    parser.add_argument("--data", help="folder of the official files, as LLaVA's playground/data/eval")
    parser.add_argument("--split", help="else the benchmark's default")
    parser.add_argument("--partial", action="store_true", help="score the questions that have an answer")
    parser.add_argument("--submission", help="file to write what the benchmark's server or judge takes")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(list(arguments))
    folder = Path(options.data) if options.data else None
    questions = table.read(options.benchmark, folder, options.split)
    answered = table.read_answered(
        options.benchmark, Path(options.answers), questions=questions, partial=options.partial
    )
    if options.submission:
        text = table.submission(options.benchmark, answered, folder, options.split)
        Path(options.submission).write_text(text, encoding="utf-8", errors="replace")
    scores = table.score(options.benchmark, answered, folder, options.split)
    record = as_json(options.benchmark, scores, questions=len(questions), answered=len(answered))
    if options.submission:
        record["submission"] = options.submission
    if options.json:
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        print_scores(options.benchmark, scores, record)
    return 0


def as_json(name: str, scores: Scores, *, questions: int, answered: int) -> dict[str, Any]:
    """What `--json` prints, and what a report keeps of a benchmark."""
    return {
        "benchmark": name,
        "questions": questions,
        "answered": answered,
        "headline": scores.headline._asdict() if scores.headline else None,
        "published": published(name),
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
            shown.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
        out.print(shown)
    if scores.headline:
        said = f"{scores.headline.name} {scores.headline.value:.2f}"
        others = ", ".join(f"{model} {number}" for model, number in record["published"].items())
        out.print(said + (f"; published: {others}" if others else ""), markup=False)
    for note in scores.notes:
        out.print(note, markup=False)
    if record.get("submission"):
        out.print(f"wrote {record['submission']}", markup=False)
