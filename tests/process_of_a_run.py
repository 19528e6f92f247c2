"""What test_processes.py runs once in its own process and once in several: a tiny finetune stage and what goes with it.

In, as a script: FOLDER LLAVA MESH (JSON) [PROCESS STEP SIGNAL]: that one gets the signal before that step. Out:
FOLDER/out.npz from process 0, FOLDER/read-PROCESS.json and trained-PROCESS.json (steps of this start) from each. With
torus.VARIABLE set the mesh is as on a torus, and process 0 of a run that begins writes FOLDER/answers.json too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import test_asking
import tiny
import torus

from moextend_jax import distributed, preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.checkpoints.hashes import content_hash
from moextend_jax.config import RECIPES, Batch, ExtensionConfig, with_extension
from moextend_jax.data.batches import Share, batches
from moextend_jax.data.datasets import open_dataset
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.extension.routing import count_all
from moextend_jax.mesh import make_mesh, on_host, own_row_shards, place_leaves, place_rows, row_shards
from moextend_jax.models.moextend import abstract
from moextend_jax.settings import StageSettings
from moextend_jax.sharding import parameter_shardings
from moextend_jax.train import loop

CONFIG = dataclasses.replace(
    with_extension(tiny.BASE_CONFIG, ExtensionConfig(layers=(0, 2), sources=(1, 3), calibrator_width=5)), remat="none"
)
ROWS, BATCH, STEPS, SAVED = 23, 4, 4, 2
FACTS = {"base": "tiny"}


class Done(NamedTuple):
    """trained: leaves by path. counts: picks [Z, O] over an epoch. ids: [batches, B, L] of that epoch, as they lie on
    the mesh."""

    trained: dict[str, np.ndarray]
    counts: np.ndarray
    ids: np.ndarray


def work(folder: Path, llava: Path, sizes: dict[str, int]) -> Done:
    """Reads an epoch, counts routing over it, and trains STEPS steps, from the newest checkpoint in `folder` if any."""
    mesh = make_mesh(sizes)
    model, share = abstract(CONFIG), Share(own_row_shards(mesh), row_shards(mesh))
    shardings = parameter_shardings(model, mesh)
    arrays = place_leaves(model, tiny.arrays(CONFIG, std=0.1), mesh)
    source = open_dataset("llava_instruct", data_dir=llava / "built", manual_dir=llava)
    tokenizer = load_tokenizer(tiny.ASSETS / "base")

    def rows(**more: Any):
        return batches(
            source,
            stage=StageSettings(data="llava_instruct", steps=STEPS, length=40, batch_size=BATCH),
            tokenizer=tokenizer,
            recipe=RECIPES["paper"],
            readers={"image": tiny.pictures(source.images, size=32, patch=16)},
            share=share,
            **more,
        )

    read = []

    def noted(some):
        for batch in some:
            read.extend(int(n) for ids_L in batch.ids_BL for n in re.findall(r"it\? (\d+)", tokenizer.decode(ids_L)))
            yield batch

    put = [place_rows(batch, mesh) for batch in noted(rows(seed=None, epochs=1))]
    counts = count_all(model, arrays, put, recipe=RECIPES["paper"], mesh=mesh)
    ids = np.stack([on_host(batch.ids_BL) for batch in put])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"read-{jax.process_index()}.json").write_text(json.dumps(read))
    frozen = {path: leaf for path, leaf in arrays.items() if not path.startswith("extensions/")}
    before = content_hash(frozen)
    job = tiny.job(
        "finetune", folder, facts=FACTS, steps=STEPS, learning_rate=1e-3, mesh=mesh, checkpoint_every=SAVED,
        checkpoints_kept=5,
    )  # fmt: skip
    put, steps = loop.place_rows, []

    def counted(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
        steps.append(batch)
        return put(batch, mesh)

    loop.place_rows = counted
    try:
        trained = loop.train_loop(model, arrays, rows(seed=3), job)
    finally:
        loop.place_rows = put
    (folder / f"trained-{jax.process_index()}.json").write_text(json.dumps(len(steps)))
    assert content_hash(frozen) == before
    train_state.save_leaves(folder / "result", trained, facts=FACTS)
    again = train_state.load_leaves(folder / "result", facts=FACTS, shardings=shardings)
    assert again is not None and content_hash(again) == content_hash(trained)
    whole = {path: on_host(leaf) for path, leaf in trained.items()}
    return Done(whole, counts.total_ZO, ids)


def strike(process: int, step: int, number: int) -> None:
    """A signal to one of the processes; steps are slow, so that the others hear of it before the last."""
    put, seen = loop.place_rows, 0

    def put_slowly(batch, mesh):
        nonlocal seen
        seen += 1
        if seen == step and jax.process_index() == process:
            os.kill(os.getpid(), number)
        time.sleep(0.5)
        return put(batch, mesh)

    loop.place_rows = put_slowly


def answers(sizes: dict[str, int]) -> list[list[int]]:
    """To 32 prompts, most with an image, on the mesh."""
    asker, mesh = test_asking.asker(rows=32, mesh=sizes), make_mesh(sizes)
    arrays = place_leaves(tiny.structure(tiny.EXTENDED), test_asking.arrays(), mesh)
    return test_asking.said(dataclasses.replace(asker, arrays=arrays), test_asking.prompts(32))


if __name__ == "__main__":
    distributed.start()
    as_on_a_torus = torus.asked()
    if len(sys.argv) > 4:
        strike(*map(int, sys.argv[4:]))
    folder = Path(sys.argv[1])
    begins = not folder.exists()
    distributed.barrier("looked")
    try:
        done = work(folder, Path(sys.argv[2]), json.loads(sys.argv[3]))
    except preemption.Preempted as notice:
        print(notice)
        distributed.leave(preemption.EXIT_CODE)
    if as_on_a_torus and begins:
        answered = answers(json.loads(sys.argv[3]))
        if distributed.first():
            (folder / "answers.json").write_text(json.dumps(answered))
    if distributed.first():
        trained: dict[str, Any] = {f"trained {path}": leaf for path, leaf in done.trained.items()}
        np.savez(folder / "out.npz", counts=done.counts, ids=done.ids, **trained)
