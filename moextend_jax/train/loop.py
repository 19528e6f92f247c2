"""The training loop of any stage: parameters and a data pipeline in, trained leaves out. Read top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax

from moextend_jax import faults, preemption
from moextend_jax.checkpoints import train_state
from moextend_jax.config import Batch, MoextendError
from moextend_jax.data.shared_memory import no_bus_error
from moextend_jax.mesh import on_host, place_rows
from moextend_jax.models.moextend import MoExtend
from moextend_jax.progress import counting, preparing
from moextend_jax.settings import RunSettings, StageSettings
from moextend_jax.train import stages
from moextend_jax.train.held_out import loss_step, mean_loss
from moextend_jax.train.meter import Meter
from moextend_jax.train.metrics import MetricsWriter
from moextend_jax.train.nonfinite import Watch
from moextend_jax.train.step import init_state, stage_step
from moextend_jax.train.tracing import Tracer
from moextend_jax.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What a stage is: the leaves it trains, its settings, where it writes, what its checkpoints must agree on.

    trains: patterns of leaf paths. folder: gets checkpoints, metrics and the batches of steps that were not finite.
    facts: JSON; a checkpoint with other facts is refused.
    resume_from: a folder of checkpoints, or one of them, to start from where `folder` has none of its own.
    name_of: gives the id of a row of the data set, for the record of a bad step.
    held_out: this process's part, on the host, of batches whose loss is computed every `settings.validate_every` steps.
    conversations: of the data set, which are read again and again; 0: not known.
    """

    name: str
    trains: tuple[str, ...]
    stage: StageSettings
    settings: RunSettings
    mesh: jax.sharding.Mesh
    folder: Path
    facts: dict[str, Any]
    resume_from: Path | None = None
    name_of: Callable[[int], str] = str
    held_out: Sequence[Batch] = ()
    conversations: int = 0


def train_loop(
    model: MoExtend, arrays: Mapping[str, jax.Array], rows: grain.IterDataset, job: Job
) -> dict[str, jax.Array]:
    """Trains `job.stage.steps` steps and returns the trained leaves by path.

    Checkpoints and metrics go to `job.folder`; a run that was cut off goes on from its newest whole checkpoint.

    Args:
      model: the structure; rows: this process's batches, on the host.
      arrays: its leaves by path, on the mesh. Those that are trained are donated, and must not be used afterwards:
        memory has no room for two copies.

    Raises:
      Preempted: the machine is to be taken away; a checkpoint of the last step is on disk.
      MoextendError: a checkpoint of another run, a disk that refuses, too many bad steps or skipped examples.
    """
    stage, settings, folder, mesh = job.stage, job.settings, job.folder, job.mesh
    steps, rollbacks = stage.steps, settings.rollbacks
    trainable, frozen = stages.split(arrays, job.trains)
    step, optimizer, like = stage_step(model, trainable, stage=stage, settings=settings, mesh=mesh)
    process = jax.process_index()
    validate = loss_step(model, chunk=stage.loss_chunk, mesh=mesh)
    watch = Watch(folder / "nonfinite", most=settings.nonfinite_limit + 1, name_of=job.name_of)

    with (
        train_state.open_manager(folder / "checkpoints", keep=settings.checkpoints_kept) as manager,
        contextlib.closing(iter(rows)) as iterator,
    ):
        saved = train_state.start(manager, like, iterator, facts=job.facts, resume_from=job.resume_from, where=folder)
        if saved is None:
            state = init_state(trainable, optimizer, shardings=jax.tree.map(lambda leaf: leaf.sharding, like))
            counts_G = faults.counts()
        else:
            state, counts_G = saved
            train_state.free(trainable)
        count = int(state.step)
        with (
            MetricsWriter(
                folder, resume_step=count, process_index=process, sinks=settings.sinks,
                name=f"{folder.parent.name}/{job.name}", settings=dataclasses.asdict(settings),
            ) as writer,
            counting(job.name, steps, done=count) as bar,
            Tracer(folder / "profile", settings.profiled) as tracer,
            preemption.deferred(),
            Watchdog(settings.hang_after) as watchdog,
        ):  # fmt: skip
            tracer.announce(job.name, after=count, last=steps)
            meter = Meter(model.config, trains=job.trains, devices=list(mesh.devices.flat))
            compiling = preparing(f"compiling {job.name}")
            last, before_last, uncounted = None, None, []
            while count < steps:
                count += 1
                with no_bus_error():
                    host = next(iterator)
                batch = place_rows(host, mesh)
                # At most two steps in flight: on a CPU split into several devices, the 33rd queued program of a device
                # blocks its thread until the first has ended, and another device may need that thread to end it.
                jax.block_until_ready(before_last)
                with tracer.step(count, state), compiling:
                    state, metrics = step(state, frozen, batch._replace(faults_BG=None, examples_Bg=None))
                watchdog.alive()  # from the first step's end on, since that step is also compiled
                tracer.after(count, metrics)
                compiling = contextlib.nullcontext()
                last, before_last = metrics, last
                watch.note(count, host, metrics)
                meter.note(batch, metrics)
                uncounted += [] if batch.faults_BG is None else [batch.faults_BG]
                validates = bool(job.held_out) and (count % settings.validate_every == 0 or count == steps)
                logs = validates or count % settings.log_every == 0 or count in (1, steps)
                saves = count % settings.checkpoint_every == 0 or count == steps
                leaves = preemption.given()
                if logs or saves or leaves:
                    watch.check()  # waits for the step
                    if (skipped := int(state.skipped)) > settings.nonfinite_limit:
                        with meter.paused(), watchdog.paused():
                            back = train_state.roll_back(manager, state) if rollbacks else None
                        if back is None:
                            raise MoextendError(
                                f"{job.name}: {skipped} steps until step {count} had a loss or gradient that is not "
                                f"finite, {settings.nonfinite_limit} are allowed; their batches are in {watch.folder}. "
                                "Look at them, lower the learning rate, or raise nonfinite_limit"
                            )
                        state, rollbacks = back, rollbacks - 1
                        print(f"{job.name}: step {count} goes back to step {int(state.step)}, with later data")
                        count = int(state.step)
                        writer.go_back(count)
                        watch.go_back()
                        if leaves:  # now, since several processes are told once; its checkpoint is on disk
                            raise preemption.Preempted(f"{job.name} is saved at step {count} of {steps}")
                        continue
                    counts_G = on_host(counts_G + sum(faults_BG.sum(0) for faults_BG in uncounted))
                    uncounted.clear()
                    faults.check_share(counts_G, settings.faults, conversations=job.conversations)
                if logs:
                    numbers = meter.numbers(metrics)
                    numbers |= {"nonfinite_steps": int(state.skipped), **faults.named(counts_G)}
                    if validates:
                        leaves_now = {**state.trainable, **frozen}
                        with meter.paused(), watchdog.paused():
                            placed = (place_rows(rows, mesh) for rows in job.held_out)
                            numbers["validation_loss"] = mean_loss(validate, leaves_now, placed)
                    writer.write(count, numbers)
                    words = f"loss {numbers['loss']:.4f}  {numbers['tokens_per_second']:,.0f} tokens/s"
                    bar.update(count, note=words)
                if saves or leaves:
                    with meter.paused(), watchdog.paused():
                        train_state.save(manager, state, iterator, step=count, facts=job.facts, counts_G=counts_G)
                        if leaves:
                            train_state.finish(manager)
                            raise preemption.Preempted(f"{job.name} is saved at step {count} of {steps}")
        train_state.finish(manager)
    return state.trainable
