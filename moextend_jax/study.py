"""Runs that differ in a few settings, for several seeds: settings in, WORKDIR/POINT/seed_N, study.json, a table and
study.html out.

Points share what comes before the extension: of every seed `align` and `extend` are made once, `select` too where it
is the same. Means have 95 % intervals over seeds (Student's t). A point is compared with the point that sets nothing
or, if there is none, with the first by name: seed by seed, since a seed moves all points together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

import jax
from rich.table import Table

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.outside import read_object
from moextend_jax.parsing import with_words
from moextend_jax.runs.data_of import data_dir_of
from moextend_jax.runs.run import as_json, cpu_devices, write_json
from moextend_jax.runs.sharing import finished, share
from moextend_jax.settings import RunSettings, decisive
from moextend_jax.terminal import console, table_of

MakeRun = Callable[[RunSettings, Path], dict[str, Any]]
"""`commands.run_and_start`: what its summary.json holds."""

LATER = ("method", "select", "grow", "finetune", "full", "text_isolation", "baseline", "mixture", "extensions")
"""Settings that the first stages do not read, except to know which rows they must not train on."""


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95 % interval (Student's t); None of a single seed."""

    mean: float
    half: float | None

    def text(self, digits: int, *, sign: bool = False) -> str:
        mean = f"{self.mean:{'+' if sign else ''},.{digits}f}"
        return mean if self.half is None else f"{mean} ± {self.half:,.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    if len(values) < 2:
        return Estimate(values[0], None)
    from scipy.stats import t  # half a second to import

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Estimate(fmean(values), half)


class Figure(NamedTuple):
    """title: for tables. of: a run's summary to the number; digits: how it is written. chain: only of several
    extensions one after another."""

    title: str
    of: Callable[[Mapping[str, Any]], float]
    digits: int
    chain: bool = False


def _accuracy(summary: Mapping[str, Any]) -> float:
    """Accuracy of the finished model; for a chain, the mean over all that it has learnt."""
    if "chains" not in summary:
        return summary["accuracy"]["moextend"]
    return fmean(list(_chain(summary)["scores"].values())[-1].values())


def _chain(summary: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(of for name, of in summary["chains"].items() if name != "full")


def _forgotten(text: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda summary: summary["text_loss"][text]["moextend"] - summary["text_loss"][text]["base"]


def _of_finetune(what: Mapping[str, float]) -> float:
    return sum(number for stage, number in what.items() if stage.startswith("finetune"))


FIGURES = {
    "accuracy": Figure("accuracy", _accuracy, 3),
    "wordnet": Figure("WordNet forgotten (nats)", _forgotten("wordnet"), 3),
    "kjv": Figure("King James forgotten (nats)", _forgotten("kjv"), 3),
    "backward": Figure("backward transfer", lambda summary: _chain(summary)["backward_transfer"], 3, chain=True),
    "start": Figure("tokens changed at the start (%)", lambda summary: 100 * summary["start"]["changed"], 1),
    "trained": Figure("trained parameters", lambda summary: _of_finetune(summary["parameters"]["trained"]), 0),
    "flops": Figure("FLOPs a token (base 1)", lambda summary: summary["flops_per_token"]["of_base"], 3),
    "seconds": Figure("seconds of finetune", lambda summary: _of_finetune(summary["seconds"]), 0),
}
"""TABLE of what is compared."""


def run_study(settings: RunSettings, workdir: Path, *, run: MakeRun) -> dict[str, Any]:
    """Makes every run that is not there yet, and returns what study.json holds: `points`, by name the settings and by
    seed each figure.

    Raises:
      MoextendError: the settings have no study, or a point sets something that there is not; before anything runs.
    """
    if settings.study is None:
        raise MoextendError("this configuration has no study: name points in it, as configs/study_extension.py does")
    # Join the processes now, before anything asks which one this is: if all points are there, no run does it.
    distributed.start(cpu_devices=cpu_devices(settings))
    plain = dataclasses.replace(settings, study=None, data_dir=settings.data_dir or str(data_dir_of(settings, workdir)))
    # The point that sets nothing goes first: the others are compared with it. A configuration has no order of names.
    words = dict(sorted(settings.study.points.items(), key=lambda point: (bool(point[1]), point[0])))
    seeds = settings.study.seeds
    points = {name: with_words(plain, own, what=f"study: {name}") for name, own in words.items()}
    if chained := [name for name, own in points.items() if own.chains]:
        raise MoextendError(f"study: {', '.join(chained)} has chains, and a point is one run: leave chains out")
    if seeded := [name for name, own in points.items() if own.seed != plain.seed]:
        raise MoextendError(
            f"study: {', '.join(seeded)} sets seed, and every point has all of study.seeds: leave it out"
        )
    figures: dict[str, dict[int, dict[str, float]]] = {name: {} for name in points}
    started = time.perf_counter()
    numbers = itertools.count(1)
    for seed in seeds:
        for name, own in points.items():
            place = f"{next(numbers)} of {len(seeds) * len(points)}: {name}, seed {seed}"
            summary = _summary(dataclasses.replace(own, seed=seed), name, workdir, place=place, points=points, run=run)
            rows = {figure: row for figure, row in FIGURES.items() if not row.chain or "chains" in summary}
            figures[name][seed] = {figure: float(row.of(summary)) for figure, row in rows.items()}
        record = {
            "data": summary["data"],
            "points": {name: {"settings": list(words[name]), "seeds": of} for name, of in figures.items()},
            "seconds": time.perf_counter() - started,
        }
        write_json(workdir / "study.json", record)  # what is known so far
    console().print(study_table(record))
    if distributed.first():
        from moextend_jax.report.study import write_study  # matplotlib takes a second to import

        print(f"study: {workdir / 'study.json'}, {write_study(record, workdir)}")
    return record


def _summary(
    own: RunSettings, name: str, workdir: Path, *, place: str, points: Mapping[str, RunSettings], run: MakeRun
) -> Mapping[str, Any]:
    """What summary.json holds of a point and seed; the run is not made again if it is there."""
    folder = workdir / name / f"seed_{own.seed}"
    done, made_with = folder / "summary.json", folder / "config.json"
    asked = as_json(dataclasses.asdict(own))
    summary = read_object(done) if done.exists() and made_with.exists() else {}
    # A run that was cut off after other settings leaves their summary beside its own config.json.
    if "start" in summary:
        settings = summary.get("settings") or read_object(made_with).get("settings") or {}
        if decisive(settings) == decisive(asked):
            return summary
    made: dict[Path, list[str]] = {}  # by folder of a point that begins alike, what it has of the first stages
    for other, settings in points.items():
        there = workdir / other / folder.name
        if other != name and _early(settings) == _early(own):
            early = ("align", "extend", *(["select"] * (settings.select == own.select)))
            made[there] = [stage for stage in early if finished(there, stage)]
    if made:  # of the one with most: a rival method's has `align` alone
        most = max(made, key=lambda there: len(made[there]))
        share(most, folder, made[most])
    console().print(f"study: {place}", highlight=False)
    summary = run(own, folder)
    write_json(done, summary | {"settings": asked})
    jax.clear_caches()  # on a CPU each program holds pieces of memory that Linux maps, 65,530 at most in a process
    return summary


def _early(settings: RunSettings) -> dict[str, Any]:
    """All that the first stages read, except the seed; also the settings of later stages that hold out rows."""
    read = {name: of for name, of in dataclasses.asdict(settings).items() if name not in (*LATER, "seed")}
    return read | {"left out": (settings.select.held_out, settings.finetune.data, settings.finetune.split)}


def study_table(record: Mapping[str, Any]) -> Table:
    """A line per point: means over seeds, and the difference from the first in accuracy."""
    seeds = next(iter(record["points"].values()))["seeds"]
    title = f"{record['data']}, {len(seeds)} seed{'s' * (len(seeds) != 1)}: mean ± half of the 95 % interval"
    headings, *rows = lines_of(record)
    return table_of(headings, rows, title=title, title_justify="left")


def lines_of(record: Mapping[str, Any]) -> list[list[str]]:
    """The table in words: its headings, then a line per point."""
    points = {name: of["seeds"] for name, of in record["points"].items()}
    first = next(iter(points))
    some = next(iter(points[first].values()))
    shown = {figure: row for figure, row in FIGURES.items() if figure in some}
    lines = [["", *(row.title for row in shown.values()), "accuracy over the first"]]
    for name, of in points.items():
        cells = [estimate([seed[figure] for seed in of.values()]).text(row.digits) for figure, row in shown.items()]
        over = [of[seed]["accuracy"] - points[first][seed]["accuracy"] for seed in of if seed in points[first]]
        lines.append([name, *cells, "" if name == first else estimate(over).text(3, sign=True)])
    return lines
