"""`moextend eval --forgetting`: what an extended model forgot, by text benchmarks of lm-eval; the paper's table.

In: the base, other models, and names of lm-eval tasks. Out: OUT/forgetting.json and a table: each task's figure under
the base and under each other model, and the average drop in points.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moextend_jax import distributed
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.asking import asker_of
from moextend_jax.folders import is_url
from moextend_jax.runs.askable import Askable, text_only
from moextend_jax.runs.run import write_json
from moextend_jax.terminal import console, table_of

TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "mbpp", "mmlu", "gsm8k")
"""The paper's text benchmarks, by lm-eval's names."""
PUBLISHED = {"MoExtend": 0.41, "full fine-tuning": 3.30}
"""The paper's average drop over `TASKS`, in points (per cent)."""
FIGURES = ("acc", "exact_match", "pass_at_1", "pass@1", "acc_norm", "f1")
"""Shares that the table can show of a task: the first of these that it has, else the task's first figure."""


class Figure(NamedTuple):
    """A task's figure, e.g. "acc,none"; in points (per cent) where it is a share."""

    name: str
    value: float
    higher_is_better: bool


class Tasks(NamedTuple):
    """Tasks that lm-eval knows; manager: its own `TaskManager`."""

    names: tuple[str, ...]
    manager: Any


def read_tasks(names: Sequence[str] = TASKS, *, include_path: Path | None = None) -> Tasks:
    """Looks tasks up, before any model is opened.

    Args:
      include_path: a folder of further tasks in lm-eval's YAML.

    Raises:
      MoextendError: lm-eval is not installed, or knows no such task.
    """
    harness = importlib.import_module("moextend_jax.evaluate.harness")  # lm-eval is an extra
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every default
    manager = harness.tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in names if task not in manager.all_tasks]
    if unknown or not names:
        raise MoextendError(
            f"lm-eval knows no task {', '.join(unknown) or 'at all'}; `lm-eval ls tasks` lists those it has, "
            f"--include_path adds a folder of others"
        )
    return Tasks(tuple(names), manager)


def forgetting(
    models: Iterable[Askable],
    tasks: Tasks,
    *,
    out: Path,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int = 4096,
    run_code: bool = False,
) -> dict[str, Any]:
    """Runs the tasks on the models, prints the table and returns what forgetting.json holds.

    Args:
      models: the base, then those that are held against it; each is taken when the one before is done.
      out: the folder to write to.
      limit: questions of each task. num_fewshot: None is the task's own.
      run_code: whether programs that the model writes may be run on this machine (MBPP does).

    Raises:
      MoextendError: lm-eval is not installed, or cannot get its data.
    """
    from moextend_jax.evaluate.harness import HarnessModel  # lm-eval is an extra

    by_model: dict[str, dict[str, Any]] = {}
    identities: dict[str, str] = {}
    for opened in models:
        name = opened.name if by_model else "base"
        harness_model = HarnessModel(asker_of(text_only(opened)), tokenizer=opened.tokenizer, max_length=max_length)
        # lm-eval keeps answers by request in a file of SQLite, which one process alone can write.
        cache = out / "lm-eval" / f"{opened.identity}-{max_length}"
        alone = jax.process_count() == 1 and not is_url(out)
        if alone:
            cache.parent.mkdir(parents=True, exist_ok=True)
        by_model[name] = _results(
            harness_model, tasks, cache=str(cache) if alone else None, limit=limit, num_fewshot=num_fewshot,
            run_code=run_code,
        )  # fmt: skip
        identities[name] = opened.identity
    others = [name for name in by_model if name != "base"]
    record = {
        "tasks": {
            task: {name: figure(results, task)._asdict() for name, results in by_model.items()} for task in tasks.names
        },
        "average_drop": {name: average_drop(by_model["base"], by_model[name], tasks.names) for name in others},
        "published_average_drop": PUBLISHED,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "models": identities,
        "results": {name: results["results"] for name, results in by_model.items()},
        "versions": {name: results.get("versions", {}) for name, results in by_model.items()},
    }
    write_json(out / "forgetting.json", record)
    if distributed.first():
        print_table(record)
    return record


def base_and(opened: Askable) -> Iterator[Askable]:
    """The base that a model was made from, where there is one, and the model."""
    if opened.open_base is not None and opened.name != "base":
        yield opened.open_base()
    yield opened


def figure(results: Mapping[str, Any], task: str) -> Figure:
    """The figure of a task that the table shows, from what lm-eval returned."""
    figures = {
        name: value
        for name, value in results["results"][task].items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in name and "_stderr" not in name
    }
    if not figures:
        raise MoextendError(f"lm-eval gave no number for task {task}: leave it out of --tasks")
    rank = {name: FIGURES.index(head) if (head := name.split(",")[0]) in FIGURES else len(FIGURES) for name in figures}
    name = min(figures, key=rank.__getitem__)
    better = results.get("higher_is_better", {}).get(task, {}).get(name.split(",")[0], True)
    share = rank[name] < len(FIGURES)
    return Figure(name, 100 * figures[name] if share else figures[name], better is not False)


def average_drop(base: Mapping[str, Any], other: Mapping[str, Any], tasks: Sequence[str]) -> float | None:
    """Mean of base less other over the tasks whose figure is a share; None where there is none."""
    pairs = [(figure(base, task), figure(other, task)) for task in tasks]
    drops = [a.value - b.value for a, b in pairs if a.name.split(",")[0] in FIGURES]
    return sum(drops) / len(drops) if drops else None


def lines_of(record: Mapping[str, Any], *, title: Callable[[str], str] = str) -> list[list[str]]:
    """What forgetting.json holds as lines of cells: the head, one of each task, and the average drop, where there is a
    model beside the base. title: what a model is called."""
    names = [name for name in next(iter(record["tasks"].values()), {}) if name != "base"]
    lines = [["task", "figure", "base", *(cell for name in names for cell in (title(name), "drop"))]]
    for task, of in record["tasks"].items():
        base = of["base"]
        sign = 1 if base["higher_is_better"] else -1
        lines.append([task, base["name"], f"{base['value']:.2f}"])
        for name in names:
            lines[-1] += [f"{of[name]['value']:.2f}", f"{sign * (base['value'] - of[name]['value']):+.2f}"]
    drops = [record["average_drop"][name] for name in names]
    cells = (cell for drop in drops for cell in ("", "" if drop is None else f"{drop:+.2f}"))
    return [*lines, ["average drop", "", "", *cells]] if names else lines


def print_table(record: Mapping[str, Any]) -> None:
    head, *lines = lines_of(record)
    out = console()
    out.print(table_of(head, lines, left=2, title="What was forgotten of text"))
    published = ", ".join(f"{name} {drop}" for name, drop in record["published_average_drop"].items())
    out.print(f"published average drop over {', '.join(TASKS)}: {published}", markup=False)


def _results(
    harness_model: Any, tasks: Tasks, *, cache: str | None, limit: int | None, num_fewshot: int | None, run_code: bool
) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    try:
        results = simple_evaluate(
            model=harness_model, tasks=list(tasks.names), num_fewshot=num_fewshot, limit=limit,
            task_manager=tasks.manager, use_cache=cache, bootstrap_iters=0, log_samples=False,
            confirm_run_unsafe_code=run_code,
        )  # fmt: skip
    except OSError as error:  # of a data set: no network, no such file
        raise MoextendError(f"lm-eval cannot get its data: {error}") from error
    except ValueError as error:
        if "unsafe" not in str(error):
            raise
        raise MoextendError(f"{error} Here: --run_code, which runs what the model writes on this machine") from None
    assert results is not None
    return dict(results)
