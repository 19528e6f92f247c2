"""The training loop of any stage: parameters and a data pipeline in, trained leaves out. Read top to bottom."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grain
import jax

from moextend_jax import preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.config import MoextendError, Recipe
from moextend_jax.data import faults
from moextend_jax.distributed import everywhere, gathered
from moextend_jax.models.moextend import MoExtend
from moextend_jax.sharding import put_batch
from moextend_jax.train import stages
from moextend_jax.train.metrics import MetricsWriter, progress
from moextend_jax.train.nonfinite import Watch
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
    resume_from: Path | None = None,
    nonfinite_limit: int = 0,
    rollbacks: int = 0,
    fault_settings: faults.FaultSettings = faults.STRICT,
    name_of: Callable[[int], str] = str,
) -> dict[str, jax.Array]:
    """Trains what the stage table says for `steps` steps and returns those leaves by path.

    Checkpoints and metrics go to `folder`; a run that was cut off goes on from its newest whole checkpoint.

    Args:
      resume_from: a folder of checkpoints, or one of them, to start from where `folder` has none of its own.
      nonfinite_limit: steps that may be skipped because their loss or gradient is not finite.
      rollbacks: how often, above that limit, the run goes back to its newest checkpoint and on with later data.
      fault_settings: what of the data may be skipped (the pipeline does it), and how much.
      name_of: the id of a row of the data set, for the record of a bad step.

    Raises:
      Preempted: the machine is to be taken away; a checkpoint of the last step is on disk.
      MoextendError: a checkpoint of another run, a disk that refuses, too many bad steps or skipped examples.
    """
    trainable, frozen = stages.split(arrays, stages.patterns(stage, recipe=recipe))
    schedule = learning_rate(optimizer_config, steps=steps, recipe=recipe)
    optimizer = make_optimizer(optimizer_config, paths=trainable)
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
    process = jax.process_index()
    watch = Watch(folder / "nonfinite", most=nonfinite_limit + 1, name_of=name_of)

    with (
        train_state.open_manager(folder / "checkpoints", kept=checkpoints_kept) as manager,
        contextlib.closing(iter(rows)) as iterator,
    ):
        state, counts_G = train_state.start(
            manager, state, iterator, facts=facts, resume_from=resume_from, where=folder
        )
        count = int(state.step)
        with (
            jax.set_mesh(mesh),
            MetricsWriter(folder, resume_step=count, process_index=process) as writer,
            progress(stage, steps, start_step=count, process_index=process) as bar,
            preemption.deferred(),
        ):
            started, tokens = time.perf_counter(), 0
            while count < steps:
                count += 1
                host = next(iterator)
                batch = put_batch(host, mesh)
                tokens += (batch.segments_BL > 0).sum()  # of all processes; nobody waits for it here
                if batch.faults_BG is not None:
                    counts_G = counts_G + batch.faults_BG.sum(0)
                state, metrics = step(state, frozen, batch._replace(faults_BG=None, examples_Bg=None))
                watch.note(count, host, metrics)
                logs = count % log_every == 0 or count in (1, steps)
                saves = count % checkpoint_every == 0 or count == steps
                leaves = preemption.given() or (jax.process_count() > 1 and manager.reached_preemption(count))
                if logs or saves or leaves:
                    watch.check()  # waits for the step
                    if (skipped := int(state.skipped)) > nonfinite_limit:
                        back = train_state.roll_back(manager, state) if rollbacks else None
                        if back is None:
                            raise MoextendError(
                                f"{stage}: {skipped} steps until step {count} had a loss or gradient that is not "
                                f"finite, {nonfinite_limit} are allowed; their batches are in {watch.folder}"
                            )
                        state, rollbacks = back, rollbacks - 1
                        print(f"{stage}: step {count} goes back to step {int(state.step)}, with later data")
                        count = int(state.step)
                        writer.go_back(count)
                        continue
                    counts_G = gathered(counts_G)
                    faults.check_share(counts_G, fault_settings)
                if logs:
                    numbers = {name: float(value) for name, value in metrics.items() if name != "finite"}
                    seconds = time.perf_counter() - started
                    numbers |= {"tokens": int(tokens), "tokens_per_second": int(tokens) / seconds, "seconds": seconds}
                    numbers |= {"nonfinite_steps": int(state.skipped), **faults.named(counts_G)}
                    writer.write(count, numbers)
                    bar.update(count, loss=numbers["loss"], tokens_per_second=numbers["tokens_per_second"])
                    started, tokens = time.perf_counter(), 0
                if saves or leaves:
                    train_state.save(manager, state, iterator, step=count, facts=facts, counts_G=counts_G)
                if leaves:
                    train_state.finish(manager)
                    raise preemption.Preempted(f"{stage} is saved at step {count} of {steps}")
        train_state.finish(manager)
    return state.trainable
