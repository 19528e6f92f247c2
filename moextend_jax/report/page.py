"""Writes a run's report as one HTML file that needs nothing else: no network, no scripts.

In: a WORKDIR as `workdir.py` reads it. Out: WORKDIR/report.html; parts that have not been run say so. Every text
from outside (questions, answers, configuration) is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from moextend_jax.folders import absolute
from moextend_jax.report import results_pictures, routing_pictures
from moextend_jax.report.chains import chains_section
from moextend_jax.report.evaluations import evaluations
from moextend_jax.report.examples import cards
from moextend_jax.report.explorer import EXPLORER
from moextend_jax.report.headline import models_table, tiles
from moextend_jax.report.importance import importance_section
from moextend_jax.report.markup import beside, picture, pictures, section, write_page
from moextend_jax.report.workdir import KINDS, NewExperts, Selection, Workdir, kind_title, number, read_workdir


def write_report(workdir: Path) -> Path:
    """Writes WORKDIR/report.html and returns its path; MoextendError if nothing of a run is there."""
    found = read_workdir(workdir)
    title = f"MoExtend: {absolute(workdir).name}"
    parts = _of_chains(found) if found.several_chains else _of_run(found, workdir)
    path = workdir / "report.html"
    write_page(path, [f"<h1>{escape(title)}</h1>", *parts], title=title)
    return path


def _of_run(found: Workdir, workdir: Path) -> list[str]:
    config = found.config or {}
    about = [f"{name} {config[name]}" for name in ("recipe", "seed") if isinstance(config.get(name), str | int)]
    return [
        f'<p class="lead">{escape(" · ".join(about) or "configuration not recorded")}</p>',
        EXPLORER_LINK if (workdir / EXPLORER).exists() else "",
        tiles(found.summary),
        _section("Accuracy and forgetting", models_table, found.summary, missing="summary.json"),
        _section("Accuracy against forgetting", _trade, found.summary, missing="summary.json"),
        *_optional(
            {
                "Extension after extension": chains_section(found.summary),
                "What each medium is worth": importance_section(found.summary),
            }
        ),
        _section("What it sees", partial(cards, summary=found.summary), found.examples, missing="examples.json"),
        *_optional(evaluations(workdir, found.summary)),  # a run does not do that by itself
        _section("Routing before and after the probe", _routing, found.selection, missing="select/routing.json"),
        _section("Which layers were extended", _choice, found.selection, missing="select/routing.json"),
        _section("What the new experts get", _new_experts, found.new_experts, missing="finetune/routing.json"),
        _section("Loss of each stage", _curves, found.metrics, missing="STAGE/metrics.jsonl"),
        _section("Time", _seconds, found.summary, missing="summary.json"),
        _section("Configuration, versions, seeds", _configuration, found.config, missing="config.json"),
    ]


def _of_chains(found: Workdir) -> list[str]:
    """The chains beside each other; the rest is in a report of each."""
    assert found.summary is not None
    folders = [escape(str(name)) for name in found.summary.get("text_loss", {})]
    links = ", ".join(f'<a href="{name}/report.html">{name}</a>' for name in folders)
    return [
        f'<p class="lead">several chains, each with a report of its own: {links}</p>',
        tiles(found.summary),
        section("Pretrained weights", models_table(found.summary)),
        section("Extension after extension", chains_section(found.summary)),
        section("Time", _seconds(found.summary)),
    ]


EXPLORER_LINK = f'<p><a href="{EXPLORER}">Routing explorer</a>: every token of the examples, layer by layer.</p>'


def _optional(parts: Mapping[str, str]) -> list[str]:
    """Sections of what there is, by title."""
    return [section(title, body) for title, body in parts.items() if body]


def _section(title: str, body: Callable[[Any], str], of: Any, *, missing: str) -> str:
    """The body made of a part of the work directory, or that the part is not there."""
    drawn = "" if of is None else body(of)
    return section(title, drawn or f'<p class="missing">Not run yet: {missing} is not there.</p>')


def _width(bars: int) -> float:
    """Inches: text stays legible on a phone as long as the bars allow it."""
    return 5.4 if bars <= 16 else 8.0


def _trade(summary: Mapping[str, Any]) -> str:
    drawn = picture(
        lambda ax: results_pictures.trade_panel(ax, summary),
        name="trade", label="Accuracy against forgetting of each model", width=5.4, height=3.2,
    )  # fmt: skip
    return beside(
        drawn,
        "Best is top left: sees well, forgot nothing. A dot is the mean over the text corpora, the line through it "
        "reaches from the least to the most forgotten corpus.",
    )


def _routing(selection: Selection) -> str:
    top, most = routing_pictures.scales(selection)
    size = {"width": 3.3, "height": routing_pictures.heatmap_height(len(selection.shift_Z))}
    drawn = []
    for kind in KINDS:
        title = kind_title(kind, medium=selection.medium)
        panels = routing_pictures.selection_panels(selection, kind=kind, top=top, most=most)
        drawn += [
            picture(draw, name=f"{kind}-{step}", label=f"Routing of {title} tokens, {step}", **size)
            for step, draw in panels.items()
        ]
    return pictures(
        drawn,
        "A cell is the share, in per cent, of a layer’s picks that went to an expert; rows add up to 100. Shift is "
        "after the router-only probe less before. Orange frames mark the experts that were copied, in the routing "
        "that named them, if one did.",
    )


def _choice(selection: Selection) -> str:
    drawn = picture(
        lambda ax: routing_pictures.choice_panel(ax, selection),
        name="choice", label="Shift of routing per layer and the chosen layers",
        width=_width(len(selection.shift_Z)), height=2.8,
    )  # fmt: skip
    pairs = ", ".join(f"{z} ← expert {e}" for z, e in selection.copied)
    chosen = (
        "the layers whose routing the new data moved most (blue)"
        if selection.by_shift
        else "the layers that were asked for (blue)"
    )
    return beside(
        drawn,
        "d<sub>j</sub> is the standard deviation over experts of the shift of their share in layer j: "
        f"{chosen} get new experts, copied from the expert numbered above the bar. Layer {pairs}.",
    )


def _new_experts(new: NewExperts) -> str:
    medium = kind_title("image", medium=new.medium)
    drawn = picture(
        lambda ax: routing_pictures.share_panel(ax, new),
        name="share", label=f"Share of {medium} and text tokens per new expert",
        width=_width(int(new.has_YX.sum())), height=3.1,
    )  # fmt: skip
    return beside(
        drawn,
        f"A tall {medium} bar beside a short text bar is a new expert that took what is new and leaves text to the "
        "pretrained ones. The dashed line is what it would get if the router knew no difference between experts.",
    )


def _curves(metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    drawn = [
        picture(
            lambda ax, rows=rows, stage=stage: results_pictures.curve_panel(ax, rows, stage=stage),
            name=f"loss-{stage}", label=f"Loss of stage {stage}", width=4.9, height=2.7,
        )
        for stage, rows in metrics.items()
        if any(isinstance(row.get("loss"), int | float) for row in rows)
    ]  # fmt: skip
    if not drawn:
        return ""
    return pictures(
        drawn,
        "Training loss per logged step, pale, and its running mean over about a thirtieth of the run. Stages train on "
        "different data, so only shapes compare. Very high first steps are cut off.",
        columns="pictures two",
    )


def _seconds(summary: Mapping[str, Any]) -> str:
    stages = summary.get("seconds")
    if not isinstance(stages, Mapping):
        return ""
    timed = {str(stage): number(summary, "seconds", stage) for stage in stages if stage != "total"}
    timed = {stage: seconds for stage, seconds in timed.items() if seconds is not None}
    total = number(summary, "seconds", "total")
    drawn = picture(
        lambda ax: results_pictures.seconds_panel(ax, timed),
        name="seconds", label="Seconds per stage", width=5.4, height=0.9 + 0.34 * max(1, len(timed)),
    ) if timed else ""  # fmt: skip
    whole = "" if total is None else f" The whole run took {results_pictures.duration(total)}."
    return beside(drawn, f"Wall time of each stage, compilation included.{whole}")


def _configuration(config: Mapping[str, Any]) -> str:
    versions = config.get("versions")
    named = versions if isinstance(versions, Mapping) else {}
    listed = ", ".join(f"{escape(str(name))} {escape(str(version))}" for name, version in named.items())
    seed = f"Seed {escape(str(config['seed']))}. " if "seed" in config else ""
    rest = {name: value for name, value in config.items() if name != "versions"}
    return (
        f"<p>{seed}{listed}</p><details><summary>Resolved configuration</summary>"
        f"<pre>{escape(json.dumps(rest, indent=2, default=str))}</pre></details>"
    )
