"""Losses of text: of the two that lie with the package, by which forgetting is told, and of the answers to the
questions of a run. A model in, mean nats per token out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from moextend_jax.config import Batch
from moextend_jax.data.batches import batches, text_batches
from moextend_jax.data.datasets import Source, open_text
from moextend_jax.data.measure import measure
from moextend_jax.data.readers import Readers
from moextend_jax.runs.askable import Askable
from moextend_jax.runs.data_of import placed
from moextend_jax.runs.run import Run
from moextend_jax.settings import StageSettings
from moextend_jax.train.held_out import loss_step, mean_loss

TEXTS = Path(__file__).parents[1] / "assets" / "text"
CORPORA = ("wordnet", "kjv")


def text_losses(run: Run, opened: Askable) -> dict[str, float]:
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)
    return {text: mean_loss(step, opened.arrays, passages(run, text)) for text in CORPORA}


def passages(run: Run, text: str) -> Iterator[Batch]:
    """One of CORPORA in batches on the mesh."""
    settings = run.settings.evaluate
    rows = text_batches(
        open_text(TEXTS / f"{text}.txt"), tokenizer=run.tokenizer, length=settings.text_length,
        batch_size=settings.text_batch_size, share=run.share, seed=None, epochs=1,
    )  # fmt: skip
    return placed(itertools.islice(rows, settings.text_batches or None), run.mesh)


def answer_stage_of(run: Run, source: Source) -> StageSettings:
    """How the answers of some rows are read: as in finetune, but each conversation whole and in a row of its own."""
    alone = {"length": 0, "images_per_row": 0, "conversations_per_row": 1, "conversation_length": 0, "accumulate": 1}
    rows = run.settings.evaluate.text_batch_size
    stage = dataclasses.replace(run.settings.finetune, batch_size=rows, **alone)
    measured = measure(
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, media=run.config.media,
        faults=run.settings.faults,
    )  # fmt: skip
    return measured.filled(stage)


def answer_loss(run: Run, opened: Askable, source: Source, *, stage: StageSettings, readers: Readers) -> float:
    """Mean nats per token of the right answers; without `readers` the model reads the text alone."""
    rows = batches(
        source, stage=stage, tokenizer=run.tokenizer, recipe=run.settings.recipe, readers=readers,
        share=run.share, seed=None, epochs=1, faults=run.settings.faults,
    )  # fmt: skip
    step = loss_step(opened.model, chunk=512, mesh=run.mesh)
    return mean_loss(step, opened.arrays, placed(rows, run.mesh))
