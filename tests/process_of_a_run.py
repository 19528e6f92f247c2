"""What test_processes.py runs once in its own process and once in several: a tiny finetune stage and what goes with it.

In, as a script: FOLDER LLAVA MESH (JSON) [PROCESS STEP SIGNAL]: that one gets the signal before that step. Out:
FOLDER/out.npz from process 0, FOLDER/read-PROCESS.json from each.
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
import tiny

from moextend_jax import distributed, pipeline, preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.config import RECIPES, ExtensionConfig
from moextend_jax.data.batches import Pixels, Share, batches
from moextend_jax.data.datasets import open_dataset
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.extension.routing import count_all
from moextend_jax.models.moextend import abstract
from moextend_jax.settings import OptimizerConfig, StageSettings
from moextend_jax.sharding import make_mesh, parameter_shardings, put_batch
from moextend_jax.train import loop
from moextend_jax.train.loop import train

CONFIG = dataclasses.replace(
    tiny.BASE_CONFIG, extension=ExtensionConfig(layers=(0, 2), sources=(1, 3), calibrator_width=5), remat="none"
)
ROWS, BATCH, STEPS, SAVED = 23, 4, 4, 2
FACTS = {"base": "tiny"}


class Done(NamedTuple):
    """trained: leaves by path. counts: picks [Z, O] over an epoch. hash: of all arrays before training."""

    trained: dict[str, np.ndarray]
    counts: np.ndarray
    hash: str


def work(folder: Path, llava: Path, sizes: dict[str, int]) -> Done:
    """Reads an epoch, counts routing over it, and trains STEPS steps, from the newest checkpoint in `folder` if any."""
    mesh = make_mesh(sizes)
    model, share = abstract(CONFIG), distributed.share_of_rows(mesh)
    shardings = parameter_shardings(model, mesh)
    arrays = {path: distributed.place(leaf, shardings[path]) for path, leaf in tiny.arrays(CONFIG, std=0.1).items()}
    source = open_dataset("llava_instruct", data_dir=llava / "built", manual_dir=llava)
    tokenizer = load_tokenizer(tiny.ASSETS / "base")

    def rows(**more: Any):
        return batches(
            source,
            stage=StageSettings(data="llava_instruct", steps=STEPS, length=40, batch_size=BATCH),
            tokenizer=tokenizer,
            recipe=RECIPES["paper"],
            images=Pixels(images=source.images, size=32, preparation="pad"),
            patches=4,
            share=Share((share.index,), share.count),
            **more,
        )

    read = []

    def noted(some):
        for batch in some:
            read.extend(int(n) for ids_L in batch.ids_BL for n in re.findall(r"it\? (\d+)", tokenizer.decode(ids_L)))
            yield batch

    with jax.set_mesh(mesh):
        put = (put_batch(batch, mesh) for batch in noted(rows(seed=None, epochs=1)))
        counts = count_all(model, arrays, put, recipe=RECIPES["paper"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"read-{jax.process_index()}.json").write_text(json.dumps(read))
    before = pipeline.content_hash(arrays)
    trained = train(
        model,
        arrays,
        rows(seed=3),
        stage="finetune",
        steps=STEPS,
        folder=folder,
        mesh=mesh,
        optimizer_config=OptimizerConfig(learning_rate=1e-3),
        recipe=RECIPES["paper"],
        aux_coefficient=0.01,
        loss_chunk=4,
        accumulate=1,
        facts=FACTS,
        checkpoint_every=SAVED,
        checkpoints_kept=5,
        log_every=1,
    )
    assert pipeline.content_hash(arrays) == before
    train_state.save_leaves(folder / "result", trained, facts=FACTS)
    again = train_state.load_leaves(folder / "result", facts=FACTS, shardings=shardings)
    assert again is not None and pipeline.content_hash(again) == pipeline.content_hash(trained)
    whole = {path: distributed.gathered(leaf) for path, leaf in trained.items()}
    return Done(whole, counts.total_ZO, before)


def strike(process: int, step: int, number: int) -> None:
    """A signal to one of the processes; steps are slow, so that the others hear of it before the last."""
    put, seen = loop.put_batch, 0

    def put_slowly(batch, mesh):
        nonlocal seen
        seen += 1
        if seen == step and jax.process_index() == process:
            os.kill(os.getpid(), number)
        time.sleep(0.5)
        return put(batch, mesh)

    loop.put_batch = put_slowly


if __name__ == "__main__":
    distributed.start()
    if len(sys.argv) > 4:
        strike(*map(int, sys.argv[4:]))
    folder = Path(sys.argv[1])
    try:
        done = work(folder, Path(sys.argv[2]), json.loads(sys.argv[3]))
    except preemption.Preempted as notice:
        print(notice)
        distributed.leave(preemption.EXIT_CODE)
    if distributed.first():
        trained: dict[str, Any] = {f"trained {path}": leaf for path, leaf in done.trained.items()}
        np.savez(folder / "out.npz", counts=done.counts, **trained)
