"""Several chains of the same extensions: settings in, WORKDIR/strict, WORKDIR/open and summary.json out.

"strict" keeps every conversation from the extensions of media that it does not have, "open" does not, and "full" tunes
everything on, one medium after another; it lies in the same folder as the last of the others, whose projectors it
starts from. The stage `mixture` lies in that of the first.

One chain uses less than two cores of a CPU, so there the second runs beside the first, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moextend_jax import distributed, machine
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.chains import chain_table, learnt_on
from moextend_jax.folders import is_url
from moextend_jax.outside import read_object
from moextend_jax.report.page import write_report
from moextend_jax.runs import results
from moextend_jax.runs.data_of import data_dir_of
from moextend_jax.runs.making import make
from moextend_jax.runs.run import left_in, working, write_json
from moextend_jax.runs.sharing import share
from moextend_jax.settings import Link, RunSettings
from moextend_jax.terminal import console

COMMON = [
    name for name, row in results.FIRST.results.items() if not row.optional and (row.how != "train" or not row.grown)
]
"""Results in which no extension takes part: the same in all chains."""

MakeRun = Callable[[RunSettings, Path], dict[str, Any]]
"""`commands.whole_run`: what its summary.json holds."""


def run_chains(settings: RunSettings, workdir: Path, *, run: MakeRun) -> dict[str, Any]:
    """Makes the chains that `settings.chains` names; goes on where it stood. Returns what summary.json holds: `chains`
    and `text_loss` by their names, `asked` and `seconds` by folder, and `composed` where questions have several media.

    Raises:
      MoextendError: there is one extension alone, or "full" without another chain.
    """
    kinds = [kind for kind in ("strict", "open") if kind in settings.chains]
    if len(settings.links) < 2 or not kinds:
        raise MoextendError(
            f"chains = {','.join(settings.chains)} needs several extensions, and strict or open among it"
        )
    began, records, first = time.perf_counter(), {}, workdir / kinds[0]
    several = machine.only_cpu() and not machine.several() and machine.cores() > 1
    several = several and len(kinds) > 1 and not is_url(workdir)
    own = {
        kind: dataclasses.replace(
            settings,
            chains=(),
            text_isolation="strict" if kind == "strict" else "none",
            baseline="full" in settings.chains and kind == kinds[-1],
            mixture=settings.mixture if kind == kinds[0] else None,
            data_dir=settings.data_dir or str(data_dir_of(settings, workdir)),
            cpu_devices=settings.cpu_devices or int(several),  # chains beside each other: a device for each
        )
        for kind in kinds
    }
    beside = {kind: Beside(own[kind], workdir / kind, first, run) for kind in kinds[1:] if several}
    try:
        for kind in kinds:
            if kind in beside:
                records[kind] = beside[kind].record()
                continue
            if kind != kinds[0]:
                share(first, workdir / kind, COMMON)
            records[kind] = run(own[kind], workdir / kind)
            if kind == "strict":
                check_nothing_is_lost(records[kind], settings.links)
    except BaseException:  # in a notebook this process goes on
        for other in beside.values():
            other.end()
        raise
    summary: dict[str, Any] = {
        "chains": {name: chain for record in records.values() for name, chain in record["chains"].items()},
        "text_loss": {kind: record["text_loss"] for kind, record in records.items()},
        "asked": {kind: record["asked"] for kind, record in records.items()},
        "frozen_unchanged": {kind: record["frozen_unchanged"] for kind, record in records.items()},
        "seconds": {kind: record["seconds"]["total"] for kind, record in records.items()}
        | {"total": time.perf_counter() - began},
    }
    if composed := {kind: record["composed"] for kind, record in records.items() if "composed" in record}:
        summary["composed"] = composed
    write_json(workdir / "summary.json", summary)
    screen = console()
    for name, chain in summary["chains"].items():
        screen.print(chain_table(name, chain))
    if distributed.first():
        print(f"report: {write_report(workdir)}")
    return summary


class Beside:
    """A chain in a process of its own. Each of its stages starts when what it shares with the chain in `made` is there.
    It ends with the process that started it. `run`, a module-level function (it is pickled), makes the chain."""

    def __init__(self, settings: RunSettings, folder: Path, made: Path, run: MakeRun):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        arguments = settings, folder, made, run, self.log, os.getpid()
        # A fork would inherit the threads of JAX, and a daemon may have no processes, which `workers` are.
        self.process = multiprocessing.get_context("spawn").Process(target=_run_beside, args=arguments)
        self.process.start()
        console().print(f"chain {folder.name} runs beside this one; its lines go to {self.log}", highlight=False)

    def record(self) -> dict[str, Any]:
        """What its summary.json holds, when it has ended.

        Raises:
          MoextendError: it has failed.
        """
        try:
            self.process.join()
        except KeyboardInterrupt:  # while this process only waits
            self.end()
            raise KeyboardInterrupt(left_in(self.folder)) from None
        if self.process.exitcode:
            lines = self.log.read_text(errors="replace").splitlines()
            raise MoextendError(f"chain {self.folder.name}: {lines[-1] if lines else 'failed'} (all of it: {self.log})")
        return read_object(self.folder / "summary.json")

    def end(self) -> None:
        """Stops it, as on a machine that is taken away."""
        self.process.terminate()
        self.process.join()


def _run_beside(settings: RunSettings, folder: Path, made: Path, run: MakeRun, log: Path, parent: int) -> None:
    machine.keep_memory()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    machine.when_left(parent, lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        if settings.baseline:  # it starts from what `align` makes, so it need not wait for the choice of layers
            _wait_for(made / "extend")
            share(made, folder, ["align"])
            with working(settings, folder) as alone:
                make(alone, "full")
        _wait_for(made / "finetune")  # the first stage that belongs to one chain alone
        share(made, folder, COMMON)
        run(settings, folder)
    except MoextendError as error:
        print(error, flush=True)
        sys.exit(2)


def _wait_for(folder: Path) -> None:
    while not folder.exists():
        time.sleep(1)


def check_nothing_is_lost(record: Mapping[str, Any], links: Iterable[Link]) -> None:
    """Raises a MoextendError unless, under strict isolation, every text loss is bit for bit the base's and no earlier
    score has changed. Questions with an item of a later extension's medium are exempt: it may answer them."""
    media = {link.name: link.medium for link in links}
    scores: Mapping[str, Mapping[str, float]] = record["chains"]["strict"]["scores"]
    lost: dict[str, float] = {}
    learnt = list(scores)
    for on, of in record["asked"].items():
        own, since = learnt_on(on), set[str]()  # media of what was learnt after that
        for after in learnt[learnt.index(own) + 1 :] if own in learnt else ():
            since.add(media[after])
            if since.isdisjoint(of["media"]) and scores[after][on] != scores[own][on]:
                lost[f"{on} after {after}"] = scores[after][on] - scores[own][on]
    for text, losses in record["text_loss"].items():
        changed = [name for name in losses if name.startswith("moextend") and losses[name] != losses["base"]]
        lost |= {f"{name} on {text}": losses[name] - losses["base"] for name in changed}
    if lost:
        told = ", ".join(f"{name} {amount:+g}" for name, amount in lost.items())
        raise MoextendError(
            f"text_isolation strict changed what it must keep exactly: {told}; this is an error in the program, please "
            "report it"
        )
