"""`moextend data check`: a run's settings in; every row and image of its data read once; a table or JSON out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moextend_jax.checkpoints.loading import open_base
from moextend_jax.data.check import Report, check, open_origin
from moextend_jax.data.datasets import shows_none
from moextend_jax.data.inspector import Reading, Work
from moextend_jax.data.splitting import all_tied
from moextend_jax.faults import KINDS, LEAST_READ, FaultSettings
from moextend_jax.media import IMAGE_MARK
from moextend_jax.runs import results
from moextend_jax.runs.media import with_media
from moextend_jax.runs.ready import row_problems, too_many_questions
from moextend_jax.runs.run import tokenizer_of_base
from moextend_jax.settings import RunSettings
from moextend_jax.terminal import quoted


def check_command(
    settings: RunSettings, *, data_dir: Path | None, processes: int, as_json: bool, console: Console
) -> int:
    """Exit code: 0 where nothing was found whose policy is `error` and no more would be skipped than may be, else 1.

    Args:
      data_dir: folder for data sets that must be built (LLaVA's are read where they are); None: a temporary one.
      processes: how many processes read and decode; 0: this one does all.
      console: for the progress, and the table unless `as_json`, which prints to standard output.
    """
    faults, manual_dir = settings.faults, settings.manual_dir or None
    base = open_base(settings.base, settings.vision, feature_layer=settings.recipe.feature_layer)
    tokenizer = tokenizer_of_base(settings, base)
    base = with_media(base, settings, tokenizer)
    work = Work(
        tokenizer=dataclasses.replace(tokenizer, others=base.config.media),
        recipe=settings.recipe,
        media=base.config.media,
    )
    with contextlib.ExitStack() as stack:
        folder = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        reports = check(
            readings_of(settings),
            open_origin=partial(
                open_origin,
                data_dir=folder,
                manual_dir=manual_dir,
                images=settings.images or None,
                media=work.media,
                faults=faults,
            ),
            work=work,
            faults=faults,
            processes=processes,
            tell=stack.enter_context(_progress(console)),
        )
    marks = {name: medium.mark for name, medium in work.media.items()}
    problems = problems_of(settings, reports, layers=len(base.config.decoder.routed), marks=marks)
    fine = all(report.ok(faults) for report in reports) and not problems
    if as_json:
        listed = [described(report, faults) for report in reports]
        print(json.dumps({"ok": fine, "data": listed, "problems": problems}, indent=1))
    else:
        for report in reports:
            print_report(report, faults, console)
        for problem in problems:
            console.print(quoted(f"a run would be refused: {problem}"))
    return 0 if fine else 1


def problems_of(
    settings: RunSettings, reports: Sequence[Report], *, layers: int, marks: Mapping[str, str]
) -> list[str]:
    """What `moextend run` would refuse before its first step though every row is sound: too few of them, no picture.
    `marks`: of the media, by name."""
    read: dict[str, list[Report]] = {}  # of each that reads: a mixture has a report for each of its data sets
    for report in reports:
        for name in report.reading.stages:
            read.setdefault(name, []).append(report)
    read = {name: parts for name, parts in read.items() if not any(report.error for report in parts)}
    counts = {name: sum(report.rows for report in parts) for name, parts in read.items()}
    table = results.table(settings)
    laid_out = {name: results.laid_out_as(settings, name) for name in table.results}  # the samples are the probe's data
    rows = {name: counts[of] for name, of in laid_out.items() if of in counts}
    problems = row_problems(settings, rows=rows, layers=layers)
    for name in read.keys() & table.results.keys():
        medium = results.aligned_medium(table.patterns(name, recipe=settings.recipe))
        if medium and not any(report.items[marks[medium]] for report in read[name]):
            problems.append(str(shows_none(name, counts[name], medium=medium)))
    for link in settings.links:
        evaluate, asked = settings.of_extension(link.name).evaluate, results.named(settings, link.name, "evaluate")
        if evaluate.data and counts.get(asked, evaluate.questions) < evaluate.questions:
            problems.append(str(too_many_questions(evaluate, counts[asked])))
        trained = read.get(results.named(settings, link.name, "finetune"), [])
        if not evaluate.data and len(trained) == 1 and trained[0].tied:
            problems.append(str(all_tied(trained[0].rows, setting="evaluate.held_out")))
    return problems


def readings_of(settings: RunSettings) -> list[Reading]:
    """What the results read (`runs/results.py`) and evaluation asks, those that read alike together."""
    names: dict[Reading, tuple[str, ...]] = {}
    table = results.table(settings)
    for name in table.training():
        row = table.result(name)
        assert row.data is not None
        of = results.stage_of(settings, row.data(settings.recipe).of)
        reading = Reading.of(results.stage_of(settings, name), of, parts="conversation")
        names[reading] = (*names.get(reading, ()), name)
    for link in settings.links:
        evaluate = settings.of_extension(link.name).evaluate
        finetune = results.stage_of(settings, results.named(settings, link.name, "finetune"))
        name, of = results.named(settings, link.name, "evaluate"), evaluate if evaluate.data else finetune
        asked = {name: (of.data, of.split)}
        asked |= {f"{name}/{further}": (data, evaluate.split) for further, data in evaluate.sets.items()}
        for of_set, (data, split) in asked.items():
            questions = Reading(data=data, split=split, length=evaluate.length, parts="prompt")
            names[questions] = (*names.get(questions, ()), of_set)
    return [dataclasses.replace(reading, stages=stages) for reading, stages in names.items()]


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        "{task.description}",
        "{task.fields[rows]:,} rows",
        "{task.completed:,.0f} files",
        "{task.fields[speed]}",
    )
    screen = Progress(*(TextColumn(column) for column in columns), TimeElapsedColumn(), console=console)
    tasks: dict[str, tuple[Any, float]] = {}

    def tell(name: str, rows: int, items: int) -> None:
        if name not in tasks:
            tasks[name] = screen.add_task(name, total=None, rows=0, speed=""), time.monotonic()
        task, began = tasks[name]
        speed = f"{items / max(time.monotonic() - began, 1e-3):,.0f} files/s"
        screen.update(task, completed=items, rows=rows, speed=speed)

    with screen:
        yield tell


def described(report: Report, faults: FaultSettings) -> dict[str, Any]:
    """A report as JSON."""
    reading = report.reading
    return {
        "stages": list(reading.stages),
        "data": reading.data,
        "split": reading.split,
        "rows": report.rows,
        "images": report.images,
        "items": dict(report.items),
        "skipped": report.skipped,
        "most_skipped": faults.most_skipped,
        "ok": report.ok(faults),
        "error": report.error,
        "kinds": {
            kind: {
                "count": count,
                "policy": faults.policy(kind),
                "first": [fault._asdict() for fault in report.first[kind]],
            }
            for kind, count in report.counts.items()
        },
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def print_report(report: Report, faults: FaultSettings, console: Console) -> None:
    reading = report.reading
    title = f"{reading.data} {reading.split} ({', '.join(reading.stages)})"
    others = "".join(f", {n:,} of {mark}" for mark, n in sorted(report.items.items()) if mark != IMAGE_MARK)
    size = f"{_count(report.rows, 'conversation')}, {_count(report.images, 'image')}{others}"
    if report.counts:
        table = Table(title=quoted(f"{title}: {size}"), title_justify="left")
        for column in ("kind", "policy", "count", "first", "what is wrong"):
            table.add_column(column, justify="right" if column == "count" else "left", overflow="fold")
        for kind, count in report.counts.items():
            first = "\n".join(f"entry {fault.entry}: {fault.id}" for fault in report.first[kind][:3])
            policy = faults.policy(kind)
            messages = list(dict.fromkeys(fault.message[:400] for fault in report.first[kind]))
            shown = messages[: 1 if KINDS[kind].file else 3]  # files of one kind differ by their names alone
            table.add_row(kind, policy, f"{count:,}", quoted(first), quoted("\n".join([KINDS[kind].means, *shown])))
        console.print(table)
    elif not report.error:
        console.print(quoted(f"{title}: {size}, no faults"))
    if report.skipped:
        share = f"{_count(report.skipped, 'conversation')} ({report.skipped / report.rows:.2%}) would be skipped"
        limit = f"{faults.most_skipped:.2%} of at least {LEAST_READ:,} may be, but not all"
        console.print(f"  {share}, {'too many' if report.too_many(faults) else 'few enough'}: {limit}")
    if report.error:
        console.print(quoted(f"{title}: cannot be read: {report.error}"))
