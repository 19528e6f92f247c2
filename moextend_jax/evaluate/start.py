"""What adding an extension has changed before it is trained: a run whose `grow` is made in, two numbers out.

The aligned model and the grown one read the first batch of the data that `finetune` will train on. Of an exact start
(a low-rank update whose B is zero, a twin) nothing changes; a copied expert changes most tokens a little.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from moextend_jax.config import Batch
from moextend_jax.mesh import Program, place_rows
from moextend_jax.parameters import with_arrays
from moextend_jax.runs import results
from moextend_jax.runs.data_of import rows_of, source_of
from moextend_jax.runs.models_of import Opened, model_with
from moextend_jax.runs.ready import ready
from moextend_jax.runs.run import Run
from moextend_jax.train.loss import cross_entropy

CHANGED = 1e-3
"""A final hidden state (of unit mean square before the norm's scale) that differs by more in some channel is another:
float32 rounds far below."""


def start_of(run: Run) -> dict[str, float]:
    """What adding the run's first extension has changed: `changed`, the share of a batch's tokens whose final hidden
    state is another, and `nats`, what that adds to its loss.

    Raises:
      MoextendError: `align` or `grow` has not been run.
    """
    run = ready(run, ["finetune"])
    row = run.table.result("finetune")
    assert row.data is not None
    data, stage = row.data(run.settings.recipe), results.stage_of(run.settings, "finetune")
    stage = dataclasses.replace(stage, accumulate=1)
    batch = next(iter(rows_of(run, source_of(run, data), stage, data=data, epochs=1, seed=None)))
    placed = place_rows(batch, run.mesh)
    aligned = tuple(name for name in row.parents if not name.startswith("grow"))

    def read(opened: Opened) -> tuple[jax.Array, jax.Array]:
        def step(arrays: dict[str, jax.Array], batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = with_arrays(opened.model, arrays)
            decoder, hidden_BLD = model.decoder, model(batch).hidden_BLD
            nats, labelled = cross_entropy(
                decoder.to_head(hidden_BLD), decoder.head_DV, batch.labels_BL, chunk=stage.loss_chunk
            )
            return hidden_BLD, nats / labelled

        return Program(step, mesh=run.mesh)(opened.arrays, placed)

    before_BLD, nats_before = read(model_with(run, aligned))
    trains = row.trains(run.settings.recipe)
    after_BLD, nats_after = read(model_with(run, row.parents, trains=trains))
    moved_BL = jnp.abs(after_BLD - before_BLD).max(axis=-1) > CHANGED
    real_BL = placed.segments_BL > 0
    changed = float((moved_BL & real_BL).sum() / real_BL.sum())
    return {"changed": changed, "nats": float(nats_after - nats_before)}
