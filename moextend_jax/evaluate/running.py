"""The models of a work directory, ready to be asked: a `Run` and an opened model in, an `Asker` out."""

from __future__ import annotations

from moextend_jax.evaluate.asking import Asker, Pictures
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend
from moextend_jax.runs.run import Arrays, Run

ROW = 256
"""Tokens of a row by which batches are measured where no length is set."""


def generator_of(run: Run, model: MoExtend) -> Generator:
    suppress = run.tokenizer.unspeakable(run.config.decoder.vocab_size)
    return Generator(model, eos=run.tokenizer.eos, suppress=suppress, mesh=run.mesh)


def asker_of(run: Run, generator: Generator, arrays: Arrays, *, pictures: Pictures | None = None) -> Asker:
    """Batches are as large as `evaluate.batch_size` rows of `evaluate.length` tokens, or of `ROW` where that is 0."""
    settings = run.settings.evaluate
    return Asker(
        generator=generator,
        arrays=arrays,
        eos=run.tokenizer.eos,
        rows=settings.batch_size,
        tokens=settings.batch_size * (settings.length or ROW),
        pictures=pictures,
    )
