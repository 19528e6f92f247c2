"""Processes that take turns: each keeps what it needs and takes one step per line of its input, so that what else the
machine does meets all of them alike. Standard library alone, for interpreters without this project's packages."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WARMUP = 2


def serve(step: Callable[[], float], facts: Mapping[str, Any]) -> None:
    """In a worker: says `facts`, then takes a step for every line of stdin and says what it took.

    Args:
      step: takes one step and returns its loss.
    """
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        wall, cpu = time.perf_counter(), time.process_time()
        loss = step()
        row = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}
        used = resource.getrusage(resource.RUSAGE_SELF)
        row |= {"peak_gb": used.ru_maxrss * 1024 / 1e9, "faults": used.ru_minflt - faults}
        print(json.dumps(row), flush=True)


class Worker:
    """A process that serves. `facts` is what it said first, `rows` what it said of each step after `WARMUP`."""

    def __init__(self, command: Sequence[str], **variables: str):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}
        )
        self.rows: list[dict[str, Any]] = []
        self.facts = self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def step(self) -> None:
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.rows.append(self._read())

    def of_each(self, what: str) -> list[float]:
        return [row[what] for row in self.rows]

    def median(self, what: str) -> float:
        return statistics.median(self.of_each(what))

    def close(self) -> None:
        self.process.communicate()


def race(workers: Sequence[Worker], *, rounds: int) -> list[float]:
    """`rounds` steps of each after the first ones, turn by turn; returns the machine's load in every round."""
    loads = []
    for number in range(WARMUP + rounds):
        for worker in workers:
            worker.step()
            if number < WARMUP:
                worker.rows.clear()
        loads.append(os.getloadavg()[0])
    return loads[WARMUP:]


def ratios(ours: Worker, theirs: Worker, what: str) -> tuple[float, float, float, float]:
    """theirs / ours: of the medians, of the least of all rounds, and the least and the most of single rounds."""
    mine, others = (worker.of_each(what) for worker in (ours, theirs))
    of_rounds = [b / a for a, b in zip(mine, others, strict=True)]
    return theirs.median(what) / ours.median(what), min(others) / min(mine), min(of_rounds), max(of_rounds)
