"""What tests share of a folder of reference numbers: its arrays, and our models and batches, opened once.

In: a folder in the layout of ../shared/oracle (its README describes it). Out: arrays by their names, `Loaded` models,
`Batch`es. Parts that a folder lacks skip the test.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

from moextend_jax.compare.observe import Observe, observer
from moextend_jax.compare.reference import (
    Reference,
    Rows,
    check_fits,
    most_images,
    read_reference,
    rows_of,
    to_batch,
    to_nhwc,
)
from moextend_jax.config import IGNORE, RECIPES, Batch, ModelConfig


def folders_of(variable: str) -> list[str]:
    """The folders that an environment variable names, with os.pathsep between them."""
    return [name for name in os.environ.get(variable, "").split(os.pathsep) if name]


NAMES = folders_of("MOEXTEND_ORACLE") or ["shared", "derived"]
"""Folders to check (conftest.py)."""
LEFT = ["derived"] if oracle.FOLDER.is_dir() else []
FOLDERS = [pytest.param(name, marks=pytest.mark.slow) if name in LEFT else name for name in NAMES]
"""The same, of which the derived one, of other sizes, is left to the slow tests where the other is there."""
LONG = [
    pytest.param("derived stages", marks=pytest.mark.long if LEFT else pytest.mark.slow) if name == "derived" else name
    for name in NAMES
]
"""The same with the stages of the derived set, whose derivation takes long."""

SIMPLE, COMPOSED = 1e-5, 1e-4
"""Absolute tolerances, float32: losses, features and gradients; what goes through all layers."""
RELEASED = RECIPES["released"]
FORWARD = {**{f"forward_{name}": name for name in oracle.MODELS}, "hf_mixtral_text": "vision"}
"""Files of forward passes, and the model of each."""


@functools.cache
def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def start(folder: Path) -> int:
    """The id of the image start tag."""
    return manifest(folder)["spec"]["image_start_id"]


def coefficient(folder: Path) -> float:
    return manifest(folder)["spec"]["coef"]


@functools.cache
def arrays(folder: Path, name: str) -> dict[str, np.ndarray]:
    """All of NAME.npz."""
    if not (folder / f"{name}.npz").is_file():
        pytest.skip(f"{folder} holds no {name}.npz")
    with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def model(folder: Path, name: str, *, remat: Any = "none") -> oracle.Loaded:
    if not (folder / name).is_dir():
        pytest.skip(f"{folder} holds no model {name}")
    return oracle.load(name, folder=folder, remat=remat)


@functools.cache
def reference(folder: Path, name: str) -> Reference:
    """NAME.npz as `moextend compare` reads it."""
    if not (folder / f"{name}.npz").is_file():
        pytest.skip(f"{folder} holds no {name}.npz")
    return read_reference(folder / f"{name}.npz")


@functools.cache
def observe(folder: Path, config: ModelConfig) -> Observe:
    """One compiled forward pass for all models of this configuration."""
    return observer(oracle.structure(config), aux_coefficient=coefficient(folder), inside=True)


@functools.cache
def batches(folder: Path, names: tuple[str, ...]) -> dict[str, Batch]:
    """Batches of batches.npz, all with the same room for images, so that one compiled program serves them."""
    inputs = {name: arrays(folder, name) for name in ("batches", "images")}
    holder = Reference(folder / "batches.npz", {}, inputs, manifest(folder)["spec"])
    rows = {name: rows_of(holder, name, start=start(folder)) for name in names}
    room = most_images(rows.values(), start=start(folder))
    return {name: batch(folder, rows[name], room=room) for name in names}


def batch(folder: Path, rows: Rows, *, room: int = 0) -> Batch:
    config = oracle.load("vision", folder=folder).config
    assert config.vision is not None
    check_fits(rows, config, name="rows")
    return to_batch(rows, start=start(folder), patches=config.vision.patches, room=room)


def unlabelled(folder: Path, ids_BL: np.ndarray, mask_BL: np.ndarray, images: Sequence[int]) -> Rows:
    """Rows with nothing to predict, whose k-th image start tag stands for image `images[k]` of images.npz."""
    pixels_nhwc = to_nhwc(arrays(folder, "images")["pixel_values"])
    return Rows(ids_BL, np.full_like(ids_BL, IGNORE), mask_BL.astype(np.int32), tuple(images), pixels_nhwc)
