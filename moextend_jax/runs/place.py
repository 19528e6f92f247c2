"""Where a model lies, as options of a command say it: a work directory and a model of its table, or a checkpoint.

What is inconsistent is refused here; `askable.open_place` opens it.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

from moextend_jax.config import RECIPES, MoextendError, Range
from moextend_jax.folders import reading
from moextend_jax.options import OneOf
from moextend_jax.runs.results import FIRST


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """A model by the folder of its run, or by its own, which may be any that `moextend import` reads.

    Raises:
      MoextendError: neither or both are given, nothing is there, or options that such a folder does not take.
    """

    workdir: Path | None = None
    """folder of a run, whose model is taken"""
    checkpoint: Path | None = None
    """folder of a model instead: whatever `moextend import` reads, or a folder of a run"""
    model: str | None = None
    """which model of the run: base, aligned, probed, moextend or full, of a later extension moextend:NAME; else
    moextend, the last"""
    base: Path | None = None
    """of a checkpoint that holds an extension alone: folder of its base"""
    vision: Path | None = None
    """folder of the vision tower, where a checkpoint has none"""
    feature_layer: Annotated[int, Range(most=-1)] | None = None
    """hidden state of the tower that the projector reads, where a checkpoint does not say it"""
    recipe: Annotated[str, OneOf(tuple(RECIPES))] | None = None
    """prompt and images as there, where a checkpoint does not say it"""
    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] | None = None
    """of the computation, where not as stored or as trained"""

    def __post_init__(self):
        if (self.workdir is None) == (self.checkpoint is None):
            raise MoextendError("asking needs --workdir: folder of a run, or --checkpoint: folder of a model; not both")
        if self.model is not None:  # of a later extension moextend:NAME, which the run knows
            OneOf(tuple(FIRST.models)).check(self.model.partition(":")[0], what="model")
        for name, names in {"recipe": RECIPES, "dtype": ("float32", "bfloat16")}.items():
            if (value := getattr(self, name)) is not None:
                OneOf(tuple(names)).check(value, what=name)
        with reading(self.folder):
            exists = self.folder.exists()
        if not exists:
            raise MoextendError(f"{self.folder} is no work directory and no checkpoint: there is no such folder")
        of_checkpoints = ("base", "vision", "feature_layer", "recipe")
        given = [f"--{name}" for name in of_checkpoints if getattr(self, name) is not None]
        if self.in_workdir and given:
            raise MoextendError(f"{self.folder} is a run and knows its base and recipe; leave {', '.join(given)} out")
        if not self.in_workdir and self.model is not None:
            raise MoextendError(f"{self.folder} is one model, no work directory; leave --model {self.model} out")

    @property
    def folder(self) -> Path:
        folder = self.workdir or self.checkpoint
        assert folder is not None
        return folder

    @functools.cached_property
    def in_workdir(self) -> bool:
        from moextend_jax.runs.run import remembered  # help must not wait for JAX

        return self.workdir is not None or bool(remembered(self.folder))
