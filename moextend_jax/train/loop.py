"""The training loop of any stage: parameters and a data pipeline in, trained leaves out. Read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax

from moextend_jax.checkpoints import train_state
from moextend_jax.config import Recipe
from moextend_jax.distributed import everywhere, shares_of_rows
from moextend_jax.models.moextend import MoExtend
from moextend_jax.sharding import put_batch
from moextend_jax.train import stages
from moextend_jax.train.metrics import MetricsWriter, progress
from moextend_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from moextend_jax.train.step import init_state, make_step


def train(
    model: MoExtend,
    arrays: Mapping[str, jax.Array],
    rows: grain.IterDataset,
    *,
    stage: str,
    steps: int,
    folder: Path,
    mesh: jax.sharding.Mesh,
    optimizer_config: OptimizerConfig,
    recipe: Recipe,
    aux_coefficient: float,
    loss_chunk: int,
    accumulate: int,
    facts: dict[str, Any],
    checkpoint_every: int,
    checkpoints_kept: int,
    log_every: int,
) -> dict[str, jax.Array]:
    """Trains what the stage table says for `steps` steps and returns those leaves by path.

    Checkpoints and metrics go to `folder`; a run that was cut off goes on from its newest checkpoint.
    """
    trainable, frozen = stages.split(arrays, stages.patterns(stage, recipe=recipe))
    schedule = learning_rate(optimizer_config, steps=steps, recipe=recipe)
    optimizer = make_optimizer(optimizer_config, paths=trainable, schedule=schedule)
    step = make_step(
        model,
        optimizer=optimizer,
        schedule=schedule,
        recipe=recipe,
        aux_coefficient=aux_coefficient,
        loss_chunk=loss_chunk,
        accumulate=accumulate,
    )
    # The step donates its state, the caller keeps its arrays: train a copy.
    state = everywhere(init_state(jax.tree.map(lambda leaf: leaf.copy(), trainable), optimizer), mesh)
    iterator = iter(rows)
    process, shares = jax.process_index(), [share.index for share in shares_of_rows(mesh)]

    with train_state.open_manager(folder / "checkpoints", every=checkpoint_every, kept=checkpoints_kept) as manager:
        if manager.latest_step() is not None:
            state = train_state.restore(manager, state, iterator, facts=facts, shares=shares, where=folder)
        done = int(state.step)
        with (
            jax.set_mesh(mesh),
            MetricsWriter(folder, resume_step=done, process_index=process) as writer,
            progress(stage, steps, start_step=done, process_index=process) as bar,
        ):
            started, tokens = time.perf_counter(), 0
            for count in range(done + 1, steps + 1):
                batch = put_batch(next(iterator), mesh)
                tokens += (batch.segments_BL > 0).sum()  # of all processes; nobody waits for it here
                state, metrics = step(state, frozen, batch)
                if count % log_every == 0 or count in (1, steps):
                    numbers = {name: float(value) for name, value in metrics.items()}  # waits for the step
                    seconds = time.perf_counter() - started
                    numbers |= {"tokens": int(tokens), "tokens_per_second": int(tokens) / seconds, "seconds": seconds}
                    writer.write(count, numbers)
                    bar.update(count, loss=numbers["loss"], tokens_per_second=numbers["tokens_per_second"])
                    started, tokens = time.perf_counter(), 0
                train_state.save(manager, state, iterator, facts=facts, shares=shares, force=count == steps)
        manager.wait_until_finished()
    return state.trainable
