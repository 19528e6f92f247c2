"""Kills a tiny stage at many points, lets the same command go on, and compares the end with an uninterrupted run's.

    python tests/survival.py [--points 60] [--workers 2]         long: the table of docs/survival.md

A point is the n-th file operation of Python in the work directory (checkpoints, metrics, results: so also inside a
save), or a time, which falls inside TensorStore's own writing too. test_survival.py runs a few of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import tensorboardX  # noqa: F401 (before forking: where PyTorch is installed it imports that, two seconds a child)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import tiny  # noqa: E402

from moextend_jax.checkpoints import train_state  # noqa: E402
from moextend_jax.checkpoints.hashes import content_hash  # noqa: E402
from moextend_jax.config import RECIPES, Batch  # noqa: E402
from moextend_jax.data.batches import batches  # noqa: E402
from moextend_jax.data.datasets import open_dataset  # noqa: E402
from moextend_jax.data.tokenizer import load_tokenizer  # noqa: E402
from moextend_jax.mesh import place_rows  # noqa: E402
from moextend_jax.settings import StageSettings  # noqa: E402
from moextend_jax.train import loop  # noqa: E402
from moextend_jax.train.metrics import read_metrics  # noqa: E402

STEPS, EVERY = 11, 3
WRITING = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate")
"""Audited operations that change the disk, beside opening for writing."""


def stage(folder: Path, llava: Path, *, workers: int = 0) -> str:
    """Trains align on packed rows, keeps the result, and returns a hash of parameters and of what each step logged."""
    source = open_dataset("llava_instruct", data_dir=llava / "built", manual_dir=llava)
    rows = batches(
        source,
        stage=StageSettings(
            data="llava_instruct", steps=STEPS, length=80, batch_size=2, images_per_row=2, conversations_per_row=2
        ),
        tokenizer=load_tokenizer(tiny.ASSETS / "base"),
        recipe=RECIPES["paper"],
        readers={"image": tiny.pictures(source.images, size=32, patch=16)},
        seed=3,
        workers=workers,
    )
    facts = {"base": "tiny", "workers": workers}
    TRAINED.clear()
    job = tiny.job("align", folder, facts=facts, steps=STEPS, checkpoint_every=EVERY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "place_rows", counted)
        trained = loop.train_loop(tiny.structure(tiny.BASE_CONFIG), tiny.arrays(tiny.BASE_CONFIG, std=0.1), rows, job)
    train_state.save_leaves(folder / "result", trained, facts=facts)
    kept = train_state.load_leaves(folder / "result", facts=facts)
    assert kept is not None and content_hash(kept) == content_hash(trained)
    return end_of(folder, trained)


TRAINED: list[Batch] = []


def counted(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    TRAINED.append(batch)
    return place_rows(batch, mesh)


def end_of(folder: Path, trained: dict[str, Any]) -> str:
    lines = [{k: v for k, v in row.items() if k not in tiny.TIMES} for row in read_metrics(folder / "metrics.jsonl")]
    said = f"{content_hash(trained)} {json.dumps(lines, sort_keys=True)}"
    return hashlib.sha256(said.encode()).hexdigest()


class Point(NamedTuple):
    """Where to die: at the n-th file operation, or so many seconds after step 1."""

    operation: int = 0
    seconds: float = 0.0


def child(work: Callable[[], str], folder: Path, point: Point | None) -> None:
    """Never returns: writes FOLDER/end.json, or dies at the point. Counts operations into FOLDER.operations."""
    done = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal done
        path = args[0] if args else ""
        if not isinstance(path, str | bytes | os.PathLike) or str(folder) not in os.fsdecode(path):
            return
        if event in WRITING or (event == "open" and isinstance(args[1], str) and set(args[1]) & set("wxa+")):
            done += 1
            if point and done == point.operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if point and point.seconds:
        threading.Thread(target=_die_in_training, args=(folder, point.seconds), daemon=True).start()
    end = work()
    (folder / "end.json").write_text(json.dumps({"end": end, "operations": done, "steps": len(TRAINED)}))
    os._exit(0)


def _die_in_training(folder: Path, seconds: float) -> None:
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
        time.sleep(0.001)  # until step 1 is compiled
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def forked(work: Callable[[], str], folder: Path, point: Point | None = None) -> int:
    """The exit code of a child that did the work, negative for a signal. Fork before JAX has devices."""
    child_id = os.fork()
    if child_id == 0:
        try:
            child(work, folder, point)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child_id, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=60)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        jax.config.update("jax_compilation_cache_dir", str(here / "compiled"))  # the same machine code, only sooner
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        llava = tiny.write_llava(here / "llava", rows=13)
        whole = here / "whole"
        began = time.perf_counter()
        for folder in (here / "first", whole):  # the first compiles, the second says how long the rest takes
            assert forked(lambda: stage(folder, llava, workers=options.workers), folder) == 0  # noqa: B023
        end = json.loads((whole / "end.json").read_text())
        assert json.loads((here / "first" / "end.json").read_text()) == end
        last = end["operations"]
        seconds = sum(row["seconds"] for row in read_metrics(whole / "metrics.jsonl")[1:])
        print(f"uninterrupted: {last} file operations, {seconds:.1f} s of steps after the first", flush=True)
        operations = options.points * 3 // 4
        at_N = np.linspace(1, last, operations) if operations > 1 else [last // 2]
        points = [Point(operation=int(n)) for n in at_N]
        points += [Point(seconds=float(s)) for s in np.linspace(1e-3, seconds, options.points - operations)]
        results = Counter()
        for number, point in enumerate(points):
            folder = here / f"point {number}"
            codes = [forked(lambda: stage(folder, llava, workers=options.workers), folder, point)]  # noqa: B023
            where = sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())
            while codes[-1] == -signal.SIGKILL or len(codes) == 1:
                codes.append(forked(lambda: stage(folder, llava, workers=options.workers), folder))  # noqa: B023
            ended = json.loads((folder / "end.json").read_text()) if codes[-1] == 0 else {"end": None, "steps": STEPS}
            # A run that begins anew ends the same too: it must train no step of the checkpoints that were there.
            again = ended["end"] if ended["steps"] <= STEPS - max(where, default=0) else "begun anew"
            kind = "file operation" if point.operation else "time"
            died = codes[0] == -signal.SIGKILL
            results[kind, died, again == end["end"]] += 1
            print(
                f"{number}: {point}, codes {codes}, checkpoints then {where}, same end {again == end['end']}",
                flush=True,
            )
        print("\n| kill point | killed | points | same end, bit for bit |\n|---|---|---|---|")
        for kind in ("file operation", "time"):
            for died in (True, False):
                good, bad = results[kind, died, True], results[kind, died, False]
                if good + bad:
                    print(f"| {kind} | {'yes' if died else 'no: had ended'} | {good + bad} | {good} |")
        print(f"\n{time.perf_counter() - began:.0f} s")
        sys.exit(any(not same for _, _, same in results))


if __name__ == "__main__":
    main()
