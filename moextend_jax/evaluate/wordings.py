"""`moextend eval --templates`: a benchmark asked in several wordings of its instruction, and what depends on them.

In: FILE, a JSON object {NAME: TEMPLATE} whose templates have {question} where the benchmark's question goes. Out:
OUT/wordings/NAME/BENCHMARK/MODEL as of one benchmark, OUT/wordings/BENCHMARK.json, and a table of all models that were
asked in the same wordings. The measures are MM-BigBench's (arXiv 2310.09036).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.benchmark import Exam, benchmark, folder_of
from moextend_jax.outside import read_object
from moextend_jax.runs.askable import Askable
from moextend_jax.runs.run import write_json
from moextend_jax.terminal import console, table_of

QUESTION = "{question}"
TOP = 3
"""Of a model's wordings, those that count as its best in `hits_mj`."""


def read_templates(path: Path) -> dict[str, str]:
    """Raises MoextendError where the file is none: not JSON, no names that can be folders, no {question}."""
    if not path.is_file():
        raise MoextendError(f"{path} does not exist: --templates names a JSON file {{NAME: TEMPLATE, ...}}")
    templates = read_object(path)
    if not templates:
        raise MoextendError(f"{path} has no templates: write {{NAME: TEMPLATE, ...}}")
    for name, template in templates.items():
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name):
            raise MoextendError(f"{path}: {name!r} cannot name a folder: letters, digits, _, - and .")
        if not isinstance(template, str) or template.count(QUESTION) != 1:
            raise MoextendError(f"{path}: template {name!r} must be a text with {QUESTION} in it once")
    return dict(templates)


def worded(exam: Exam, template: str) -> Exam:
    """The exam in another wording. Its files record the benchmark's own prompts, which some tell questions apart by."""
    before, after = template.split(QUESTION)
    every = [
        dataclasses.replace(question, text=before + question.text + after, prompt=question.recorded)
        for question in exam.every
    ]
    return exam._replace(every=every)


def ask_wordings(
    opened: Askable, exam: Exam, templates: Mapping[str, str], *, out: Path, max_new_tokens: int | None = None
) -> dict[str, Any]:
    """Asks every question in every wording, prints, and returns what OUT/wordings/BENCHMARK.json holds: by model the
    score in each wording, of this model and of those that were asked in the same wordings before.

    Raises:
      MoextendError: the benchmark cannot be scored here, or as `benchmark`.
    """
    if not exam.has_score:
        few = "" if exam.limit is None else f" of its first {exam.limit} questions"
        raise MoextendError(f"{exam.name} has no score here{few} to compare wordings by: leave --templates out")

    def has(model: str, scores: Mapping[str, float]) -> bool:
        """Whether these scores are still in the model's files: another model of its name may have replaced them."""
        for name, score in scores.items():
            path = folder_of(out / "wordings" / name, exam.name, split=exam.split, model=model) / "scores.json"
            if not path.exists() or (read_object(path).get("headline") or {}).get("value") != score:
                return False
        return True

    at = folder_of(out / "wordings", exam.name, split=exam.split, model="").with_suffix(".json")
    scores = {}
    for name, template in templates.items():
        if distributed.first():
            console().print(f"wording {name}: {template!r}", highlight=False, markup=False)
        folder = out / "wordings" / name
        record = benchmark(opened, worded(exam, template), out=folder, max_new_tokens=max_new_tokens, template=template)
        scores[name] = distributed.from_first(lambda record=record: record["headline"]["value"])
    before = read_object(at) if distributed.first() and at.exists() else {}
    asked = {"benchmark": exam.name, "split": exam.split, "limit": exam.limit, "templates": dict(templates)}
    asked |= {"max_new_tokens": max_new_tokens}
    others = before.get("models", {}) if {name: before.get(name) for name in asked} == asked else {}
    models = {model: of for model, of in others.items() if has(model, of)} | {opened.name: scores}
    record = asked | {"models": models}
    if distributed.first():
        console().print(wordings_table(record))
    write_json(at, record)
    return record


def wordings_table(record: Mapping[str, Any]) -> Table:
    """A line per model: its score in each wording, then best, mean, spread and, beside others, gain."""
    models, wordings = record["models"], list(record["templates"])
    found = measures(np.array([[[of[name] for name in wordings]] for of in models.values()]))
    several = len(models) > 1
    headings = ["", *wordings, "best", "mean", "spread", *(["gain %"] * several)]
    table = table_of(headings, title=f"{record['benchmark']} in {len(wordings)} wordings", title_justify="left")
    for m, (model, of) in enumerate(models.items()):
        cells = [of[name] for name in wordings]
        gain = [f"{found['gain_of_model_md'][m, 0]:+.1f}"] * several
        measured = (found["best_md"][m, 0], np.mean(cells), found["stability_of_model_md"][m, 0])
        table.add_row(model, *(f"{cell:.2f}" for cell in (*cells, *measured)), *gain)
    gains = found["gain_of_instruction_jd"][:, 0]
    table.add_row("gain of the wording %", *(f"{gain:+.1f}" for gain in gains), "", "", "", *[""] * several)
    return table


def measures(results_mdj: np.ndarray, *, top: int = TOP) -> dict[str, np.ndarray]:
    """MM-BigBench's of results of models m on data sets d in wordings j, higher being better.

    best_md: the best wording's. gain_of_model_md: mean over wordings of how far, in per cent, a model is above the mean
    of all models; gain_of_instruction_jd: mean over models of how far a wording is above the mean of all wordings.
    stability_*: population standard deviations, over wordings or over models. hits_mj: of a model, the share of its
    `top` best wordings of all data sets that wording j is, in per cent; of equal ones the later counts as better.
    """
    _, d, j = results_mdj.shape
    ranked_mdj = j - 1 - np.argsort(-results_mdj[:, :, ::-1], axis=2, kind="stable")
    best_mdt = ranked_mdj[:, :, :top]
    hits_mj = np.array([np.bincount(best_dt.reshape(-1), minlength=j) for best_dt in best_mdt])
    return {
        "best_md": results_mdj.max(axis=2),
        "gain_of_model_md": _gain(results_mdj, axis=0).mean(axis=2),
        "gain_of_instruction_jd": _gain(results_mdj, axis=2).mean(axis=0).T,
        "stability_of_model_md": results_mdj.std(axis=2),
        "stability_of_instruction_jd": results_mdj.std(axis=0).T,
        "hits_mj": 100 * hits_mj / (top * d),
    }


def _gain(results_mdj: np.ndarray, *, axis: int) -> np.ndarray:
    """In per cent of the mean, to which MM-BigBench adds 1e-6; where nobody scored, none instead of its -100 %."""
    mean = results_mdj.mean(axis=axis, keepdims=True)
    return np.where(mean == 0, 0.0, 100 * (results_mdj - (mean + 1e-6)) / (mean + 1e-6))
