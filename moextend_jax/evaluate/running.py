"""The models of a work directory, ready to be asked: a `Run` and a model's name in, an `Asker` out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import NamedTuple

from moextend_jax import pipeline
from moextend_jax.config import MoextendError
from moextend_jax.evaluate.asking import Asker, Pictures
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend
from moextend_jax.pipeline import Arrays, Run

STAGES = {"base": (), "aligned": ("align",), "moextend": ("align", "grow", "finetune"), "full": ("align", "full")}
"""TABLE of models: the stages whose results each is made of, over the pretrained parts."""


class Opened(NamedTuple):
    model: MoExtend
    arrays: Arrays


def open_model(run: Run, name: str) -> Opened:
    """A row of STAGES. "base" is the pretrained decoder alone, without eyes.

    Raises:
      MoextendError: no such model, or a stage that has not been run.
    """
    if name not in STAGES:
        raise MoextendError(f"there is no model {name!r}; there are {', '.join(STAGES)}")
    if name == "base":
        return text_only(pipeline.abstract(run.config), run.pretrained)
    if name == "moextend":
        return Opened(*pipeline.moextend_model(run))
    return Opened(pipeline.abstract(run.config), pipeline.full_model(run) if name == "full" else pipeline.kappa(run))


def text_only(model: MoExtend, arrays: Arrays) -> Opened:
    """The model without its eyes."""
    blind = pipeline.abstract(dataclasses.replace(model.config, vision=None))
    return Opened(
        blind, {path: leaf for path, leaf in arrays.items() if not path.startswith(("vision/", "projector/"))}
    )


def identity(run: Run, name: str) -> str:
    """Names the model by what it is made of: answers of two identities must not be mixed."""
    stages = {stage: run.result_identity(stage) for stage in STAGES[name]}
    digest = hashlib.sha256(json.dumps([run.base_hash, stages, run.settings.dtype]).encode())
    return f"{name}-{digest.hexdigest()[:12]}"


def generator_of(run: Run, model: MoExtend) -> Generator:
    tags = run.config.tags
    return Generator(model, eos=run.tokenizer.eos, suppress=(tags.start, tags.end, tags.pad))


def asker_of(run: Run, generator: Generator, arrays: Arrays, *, pictures: Pictures | None = None) -> Asker:
    """Batches are as large as `evaluate.batch_size` rows of `evaluate.length` tokens."""
    settings = run.settings.evaluate
    return Asker(
        generator=generator,
        arrays=arrays,
        mesh=run.mesh,
        eos=run.tokenizer.eos,
        rows=settings.batch_size,
        tokens=settings.batch_size * settings.length,
        pictures=pictures,
    )
