"""Models of ../shared/oracle, which the released PyTorch code made, in our shapes; and the committed slice of it.

In: names of that folder's models (its README describes them). Out: structures, arrays by our paths, configurations.
tests/parity compares what the folder says of them.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest

from moextend_jax.checkpoints import huggingface, released
from moextend_jax.config import ImageTags, ModelConfig, of_pictures
from moextend_jax.models.moextend import MoExtend, abstract

FOLDER = Path(__file__).parents[2] / "shared" / "oracle"
SLICE = Path(__file__).parent / "data" / "oracle_slice.npz"
"""A few of the arrays, committed, so that some parity runs anywhere; made by data/make_oracle_slice.py."""

needs_oracle = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference values: {FOLDER} is absent")

MODELS = ("vision", "vision_gate", "moextend_init", "moextend_pert")


class Loaded(NamedTuple):
    """`model` is the structure without arrays."""

    model: MoExtend
    arrays: dict[str, jax.Array]
    config: ModelConfig


@functools.cache
def load(name: str, *, folder: Path = FOLDER, remat: Any = "none") -> Loaded:
    """A model by its files alone, without `open_checkpoint`. Models of one configuration share their structure."""
    start = json.loads((folder / "manifest.json").read_text())["spec"]["image_start_id"]
    attributes = folder / name / "config.json"
    config = of_pictures(
        decoder=huggingface.read_decoder_config(folder / name),
        vision=huggingface.read_vision_config(folder / "clip", feature_layer=-1),
        extension=released.extension_config(huggingface.read_json(attributes), where=attributes),
        dtype="float32",
        remat=remat,
        tags=ImageTags(start=start, end=start + 1, pad=start + 2),
    )
    model = structure(config)
    arrays = huggingface.read_parameters(folder / name, table="released", config=config)
    return Loaded(model, {path: jnp.asarray(array) for path, array in arrays.items()}, config)


structure = abstract
