"""The embedded base is the one that was hashed, is small, and has learnt to read."""

from __future__ import annotations

import hashlib

import jax.numpy as jnp
import pytest
import tiny

from moextend_jax.checkpoints import huggingface
from moextend_jax.checkpoints.loading import EMBEDDED
from moextend_jax.config import of_pictures
from moextend_jax.data.batches import text_batches
from moextend_jax.data.datasets import open_text
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.models.moextend import abstract
from moextend_jax.train.held_out import loss_step, mean_loss


def test_the_files_are_those_of_the_hash_list():
    listed = {line[66:]: line[:64] for line in (EMBEDDED / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(EMBEDDED).as_posix() for path in EMBEDDED.rglob("*") if path.is_file()}
    assert there - set(listed) == {"SHA256SUMS", "MODEL_CARD.md"}
    for name, digest in listed.items():
        assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest() == digest, name
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) <= 32 * 2**20


@pytest.mark.slow
def test_it_loads_and_reads_text_better_than_it_could_guess():
    config = of_pictures(
        decoder=huggingface.read_decoder_config(EMBEDDED),
        vision=huggingface.read_vision_config(EMBEDDED / "vision", feature_layer=-2),
        dtype="float32",
        remat="none",
    )
    model = abstract(config)
    arrays = {
        **huggingface.read_parameters(EMBEDDED, table="mixtral", config=config),
        **huggingface.read_parameters(EMBEDDED / "vision", table="clip", config=config),
    }
    arrays = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in arrays.items()}
    assert config.vision is not None
    sizes = {**config.sizes(), "C": config.vision.width, "d": config.decoder.width}
    projector = {"first": "CD", "first_bias": "D", "second": "dD", "second_bias": "D"}
    arrays |= {
        f"media/image/projector/{name}": jnp.zeros([sizes[axis] for axis in axes]) for name, axes in projector.items()
    }
    step = loss_step(model, chunk=64)
    for text in ("wordnet", "kjv"):
        passages = open_text(tiny.ASSETS / "text" / f"{text}.txt")[:40]
        rows = text_batches(passages, tokenizer=load_tokenizer(EMBEDDED), length=128, batch_size=8, seed=None, epochs=1)
        assert 1 < mean_loss(step, arrays, rows) < 7  # a guess over 32,000 pieces costs 10.4
