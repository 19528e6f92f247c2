"""Models ready to be asked: an `Askable` in, its compiled steps or an `Asker` out."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from jax.sharding import Mesh

from moextend_jax.config import ModelConfig
from moextend_jax.evaluate.asking import Asker, Reader
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import abstract
from moextend_jax.runs.askable import Askable

ROW = 256
"""Tokens of a row by which batches are measured where no length is set."""


def generator_of(opened: Askable) -> Generator:
    """Models of one structure share what is compiled."""
    tokenizer = opened.tokenizer
    suppress = tokenizer.unspeakable(opened.config.decoder.vocab_size)
    return _generator(opened.config, tokenizer.ends, suppress, opened.mesh)


@functools.lru_cache(maxsize=16)
def _generator(config: ModelConfig, ends: tuple[int, ...], suppress: tuple[int, ...], mesh: Mesh) -> Generator:
    return Generator(abstract(config), eos=ends[0], ends=ends, suppress=suppress, mesh=mesh)


def asker_of(opened: Askable, *, readers: Mapping[str, Reader] | None = None) -> Asker:
    """Batches are as large as `sizes.batch_size` rows of `sizes.length` tokens, or of `ROW` where that is 0."""
    return Asker(
        generator=generator_of(opened),
        arrays=opened.arrays,
        ends=opened.tokenizer.ends,
        rows=opened.sizes.batch_size,
        tokens=opened.sizes.batch_size * (opened.sizes.length or ROW),
        media=tuple(opened.tokenizer.media),
        readers=readers or {},
    )
