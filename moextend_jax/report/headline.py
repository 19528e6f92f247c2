"""The first thing a reader wants: accuracy, forgetting and whether the pretrained weights are untouched.

In: summary.json. Out: HTML of the tiles and of the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from statistics import fmean
from typing import Any

from moextend_jax.report.markup import how, table
from moextend_jax.report.results_pictures import CORPORA, duration, forgetting, title_of
from moextend_jax.report.workdir import data_title, number, value_at
from moextend_jax.runs.results import ANSWERING, FIRST


def tiles(summary: Mapping[str, Any] | None) -> str:
    """The three or four numbers to remember."""
    ours, alone = (number(summary, "accuracy", model) for model in ("moextend", "question_only"))
    shown = []
    if ours is not None:
        against = "" if alone is None else f"; the question alone gives {alone:.1%}"
        shown.append((f"{ours:.1%}", f"{escape(data_title(summary))} accuracy{against}"))
    lost, rival = (forgetting(summary, model=model) for model in ("moextend", "full"))
    if lost:
        against = f"; full tuning {fmean(rival):+.3f}" if rival else ""
        shown.append((f"{fmean(lost):+.3f}", f"nats of text loss gained (forgetting){against}"))
    unchanged = _unchanged(summary)
    if unchanged is not None:
        mark = '<i class="good">✓ identical</i>' if unchanged else '<i class="bad">✗ changed</i>'
        shown.append((mark, "pretrained weights, bit for bit"))
    total = number(summary, "seconds", "total")
    if total is not None:
        shown.append((duration(total), "for the whole run"))
    cells = "".join(f'<div class="tile"><b>{figure}</b><span>{of}</span></div>' for figure, of in shown)
    return f'<div class="tiles">{cells}</div>' if shown else ""


def models_table(summary: Mapping[str, Any]) -> str:
    """Accuracy, and loss with what it gained over the base, of every model; a model that was not run says so. Several
    chains have these in reports of their own."""
    if "accuracy" not in summary:
        return _frozen(summary)
    questions = number(summary, "accuracy", "questions")
    answers = summary.get("answer_loss") is not None
    heads = ["", "accuracy", *["answers<br>loss"] * answers]
    heads += [f"{name}<br>loss / gained" for name in CORPORA.values()]
    rows = []
    aligned_is_base = title_of("aligned", summary) == title_of("base", summary)  # one line says it of a task in text
    for model in ("base", "question_only", *ANSWERING)[aligned_is_base:]:
        title = "Base model, text only" if model == "base" else title_of(model, summary)
        rows.append([title, "" if model == "base" else _accuracy(number(summary, "accuracy", model), questions)])
        if answers:
            nats = number(summary, "answer_loss", model)
            rows[-1].append("" if nats is None else f"{nats:.3f}")
        rows[-1] += [_loss(summary, corpus, model) for corpus in CORPORA]
    asked = (
        ""
        if questions is None
        else f" on {questions:,.0f} questions ({escape(data_title(summary))}), with its 95% interval"
    )
    right = "Loss of answers is in nats per token of the right ones. " if answers else ""
    return (
        table(heads, rows, ours=title_of("moextend", summary))
        + how(
            f"Accuracy is the share of answers that match exactly{asked}. {right}"
            "Loss of text is in nats per token of held-out text; what it gains over the base model is what was "
            "forgotten, so 0 is perfect and less is better. "
            "Aligning leaves the language model as it was."
        )
        + _frozen(summary)
        + _trained(summary)
    )


def _accuracy(accuracy: float | None, questions: float | None) -> str:
    if accuracy is None:
        return "<small>not run</small>"
    if not questions:
        return f"{accuracy:.1%}"
    # Wilson's interval, which is no point where few questions are all right or all wrong.
    scale = 1 + 1.96**2 / questions
    centre = (accuracy + 1.96**2 / (2 * questions)) / scale
    half = 1.96 / scale * math.sqrt(accuracy * (1 - accuracy) / questions + (0.98 / questions) ** 2)
    return f"{accuracy:.1%} <small>{100 * max(0.0, centre - half):.1f}–{100 * min(1.0, centre + half):.1f}</small>"


def _loss(summary: Mapping[str, Any], corpus: str, model: str) -> str:
    loss, base = number(summary, "text_loss", corpus, model), number(summary, "text_loss", corpus, "base")
    if loss is None:
        if model == "question_only":
            return ""
        return f"<small>{'as the base' if FIRST.models[model].text_is_bases else 'not run'}</small>"
    return f"{loss:.3f}" if model == "base" or base is None else f"{loss:.3f} / {loss - base:+.3f}"


def _unchanged(summary: Mapping[str, Any] | None) -> bool | None:
    """Whether all pretrained weights are what they were, in every chain; None where that was not looked at."""
    unchanged = (summary or {}).get("frozen_unchanged")
    return all(unchanged.values()) if isinstance(unchanged, Mapping) else unchanged


def _frozen(summary: Mapping[str, Any]) -> str:
    unchanged = _unchanged(summary)
    if unchanged is None:
        return ""
    if unchanged is True:
        return '<p><b class="good">✓</b> Every pretrained weight is bit-identical to the base model’s.</p>'
    return '<p><b class="bad">✗ Pretrained weights changed: freezing is broken in this run.</b></p>'


def _trained(summary: Mapping[str, Any]) -> str:
    total = number(summary, "parameters", "total")
    trained = value_at(summary, "parameters", "trained")
    if total is None or not isinstance(trained, Mapping):
        return ""
    counts = {name: number(summary, "parameters", "trained", name) or 0.0 for name in trained}
    listed = ", ".join(f"{escape(str(name))} {count:,.0f} ({count / total:.1%})" for name, count in counts.items())
    return how(f"Parameters: {total:,.0f}; trained: {listed}.")
