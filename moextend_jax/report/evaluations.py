"""Benchmarks beside published numbers, what was forgotten by task, and questions with their pictures.

In: WORKDIR/eval: NAME/MODEL/scores.json and examples.json as `evaluate/benchmark.py` writes them, forgetting.json of
`evaluate/forgetting.py`. Out: HTML; "" where nothing was evaluated. All texts come from outside, so all are escaped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.evaluate.forgetting import lines_of
from moextend_jax.report.examples import small_image
from moextend_jax.report.markup import how, text_table
from moextend_jax.report.results_pictures import MODELS, title_of
from moextend_jax.report.workdir import malformed, read_json_of


class Benchmark(NamedTuple):
    """One benchmark, or a split of one, as one model answered it."""

    name: str
    model: str
    record: Mapping[str, Any]
    examples: Sequence[Mapping[str, Any]]


def evaluations(workdir: Path, summary: Mapping[str, Any] | None) -> dict[str, str]:
    """HTML of what is in WORKDIR/eval, by title; raises MoextendError for a file that does not hold what its name
    says."""
    folder, benchmarks = workdir / "eval", []
    if not folder.is_dir():
        return {}
    for name in sorted(child for child in folder.iterdir() if child.is_dir()):
        for model in sorted(child for child in name.iterdir() if (child / "scores.json").exists()):
            scores, examples = (
                read_json_of(model / file, kind) for file, kind in (("scores.json", dict), ("examples.json", list))
            )
            benchmarks.append(Benchmark(name.name, model.name, scores, examples or ()))
    return {
        "Benchmarks": _benchmark_table(benchmarks, summary),
        "What was forgotten of text": _forgetting_table(read_json_of(folder / "forgetting.json", dict), summary),
        "Questions of the benchmarks": _question_cards(benchmarks, summary),
    }


def _benchmark_table(benchmarks: Sequence[Benchmark], summary: Mapping[str, Any] | None) -> str:
    """HTML: a line per benchmark, with the figure of each of our models, then the published ones."""
    if not benchmarks:
        return ""
    with malformed("eval/*/scores.json"):
        evaluated = {benchmark.model for benchmark in benchmarks}
        models = [*(model for model in MODELS if model in evaluated), *sorted(evaluated.difference(MODELS))]
        others = list(dict.fromkeys(name for benchmark in benchmarks for name in benchmark.record.get("published", {})))
        heads = ["benchmark", "figure", *(title_of(model, summary) for model in models), *others, "questions"]
        rows = []
        for name in dict.fromkeys(benchmark.name for benchmark in benchmarks):
            of = {benchmark.model: benchmark.record for benchmark in benchmarks if benchmark.name == name}
            published = next(iter(of.values())).get("published", {})
            figure = next((record["headline"]["name"] for record in of.values() if record["headline"]), "to be judged")
            cells = [name, figure, *(_headline(of.get(model)) for model in models)]
            cells += [f"{published[other]:.1f}" if other in published else "" for other in others]
            cells.append("/".join(dict.fromkeys(f"{record['answered']:,}" for record in of.values())))
            rows.append(cells)
    note = "Each figure by the benchmark’s own rule (docs/evaluation.md)."
    if others:
        note += (
            " Published: the paper’s MoExtend and the row of LLaVA-1.5 beside it; of another base model, so a scale "
            "more than a rival."
        )
    return text_table(heads, rows) + how(note)


def _forgetting_table(record: Mapping[str, Any] | None, summary: Mapping[str, Any] | None) -> str:
    """HTML: a line per task, with the figure of the base, then of every other model with its drop, in points."""
    if record is None:
        return ""
    with malformed("eval/forgetting.json"):
        lines = lines_of(record, title=lambda model: title_of(model, summary))
        head, *rows = [[*map(str, cells)] for cells in lines]
        published = ", ".join(f"{escape(str(k))} {v:.2f}" for k, v in record.get("published_average_drop", {}).items())
    return text_table(head, rows, ours="average drop") + how(
        f"Text benchmarks of lm-eval, in points; a drop is the base less the model, so 0 is perfect. The paper’s "
        f"average drop: {published}."
    )


def _question_cards(benchmarks: Sequence[Benchmark], summary: Mapping[str, Any] | None) -> str:
    """HTML: some questions of each benchmark, with picture, right answer and the model's."""
    parts = []
    with malformed("eval/*/examples.json"):
        for benchmark in benchmarks:
            if benchmark.examples:
                drawn = "".join(_card(example) for example in benchmark.examples)
                title = f"{benchmark.name}, {title_of(benchmark.model, summary)}"
                parts.append(f'<h3>{escape(title)}</h3><div class="cards">{drawn}</div>')
    return "".join(parts)


def _card(example: Mapping[str, Any]) -> str:
    image = f'<div class="pair"><div class="frame">{small_image(str(example["image_png"]))}</div></div>' if example.get(
        "image_png"
    ) else ""  # fmt: skip
    points = example.get("points")
    mark = "" if points is None else f' <i class="{"good" if points >= 0.5 else "bad"}">{points:.0%}</i>'
    lines = f"<li><span>Said</span><span>{escape(str(example['said']))}{mark}</span></li>"
    if example.get("answer") is not None:
        lines = f"<li><span>Right answer</span><span>{escape(str(example['answer']))}</span></li>{lines}"
    return f'<div class="card">{image}<p><b>{escape(str(example["question"]))}</b></p><ul>{lines}</ul></div>'


def _headline(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return "not run"
    return "–" if record["headline"] is None else f"{record['headline']['value']:.1f}"
