"""The extender: counts of picks, chosen layers and source experts, and how new experts start, all exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moextend_jax.compare.forward import equal_columns
from moextend_jax.compare.reference import chosen_images
from moextend_jax.config import Batch, ExtensionConfig, Recipe, with_extension
from moextend_jax.extension import routing
from moextend_jax.extension.grow import grow
from moextend_jax.parameters import with_arrays
from parity import sets

pytestmark = pytest.mark.smoke

MODES: dict[str, Recipe] = {
    "ascending": sets.RELEASED,
    "top2": dataclasses.replace(sets.RELEASED, counted_picks="top_k"),
}
"""Names in the file: the released code counts the k least likely experts, the paper the k most likely."""
ROWS = 8
"""Sequences at once: one row does not change another."""


def test_counts_shifts_and_choices_of_every_mode(folder: Path):
    theirs = sets.arrays(folder, "selection")
    batches = list(_sequences(folder))
    models = [sets.model(folder, name) for name in ("vision", "vision_gate")]
    assert models[0].config == models[1].config

    @jax.jit
    def count(arrays, batch: Batch):
        picked = with_arrays(models[0].model, arrays)(batch).routing
        return {mode: routing.count_picks(picked, batch, recipe=recipe) for mode, recipe in MODES.items()}

    before, after = (_summed([count(model.arrays, batch) for batch in batches]) for model in models)
    image_tokens = sum(int((batch.places_BL >= 0).sum()) for batch in batches)
    unknown = set(theirs) - {"input_ids", "lengths"}
    for mode, recipe in MODES.items():
        assert before[mode].image_tokens == image_tokens
        assert before[mode].text_tokens + image_tokens == theirs["lengths"].sum()
        if f"{mode}/selected_layers" not in theirs:
            continue
        some = {key.partition("/")[2]: array for key, array in theirs.items() if key.startswith(mode + "/")}
        unknown -= {f"{mode}/{name}" for name in _check(some, before[mode], after[mode], recipe=recipe)}
    assert not unknown


def _check(theirs: dict[str, Any], before: routing.Counts, after: routing.Counts, *, recipe: Recipe) -> set[str]:
    """Asserts that all is equal, and returns what was compared."""
    layers = theirs["selected_layers"]
    chosen = routing.select(before, after, share=(len(layers) + 0.5) / len(before.total_ZO), recipe=recipe)
    shares = [routing.shares(counts.total_ZO) for counts in (before, after)]
    order = np.argsort(layers)  # files rank by d_j; ours ascend
    exact = {
        "counts_before": (before.total_ZO, theirs.get("counts_before")),
        "counts_after": (after.total_ZO, theirs.get("counts_after")),
        "selected_layers": (chosen.layers, layers[order]),
        "expert_idxmax": (chosen.sources, theirs["expert_idxmax"][order]),
        "expert_idxmax_all_layers": (shares[1].argmax(axis=1), theirs.get("expert_idxmax_all_layers")),
    }
    close = {"dist_before": shares[0], "dist_after": shares[1], "std": chosen.shift_Z}
    for name in exact.keys() & theirs.keys():
        np.testing.assert_array_equal(*exact[name], err_msg=name)
    for name in close.keys() & theirs.keys():
        np.testing.assert_allclose(close[name], theirs[name], atol=sets.SIMPLE, rtol=0, err_msg=name)
    return (exact.keys() | close.keys()) & theirs.keys()


def _sequences(folder: Path) -> Iterator[Batch]:
    """The sequences, a few to a batch: padding is not counted."""
    theirs, images = sets.arrays(folder, "selection"), sets.arrays(folder, "images")
    mask_BL = np.arange(theirs["input_ids"].shape[1]) < theirs["lengths"][:, None]
    ids_BL = np.where(mask_BL, theirs["input_ids"], 0)
    tags_B = (ids_BL == sets.start(folder)).sum(axis=1)
    order = images.get("selection/image_index", np.zeros(0, np.int32))
    if len(order) != len(ids_BL):  # a number per start tag, instead of a line per sequence
        order = np.split(order, np.cumsum(tags_B)[:-1])
    chosen = [chosen_images(np.atleast_1d(line), count=len(images["pixel_values"])) for line in order]
    assert [len(line) for line in chosen] == tags_B.tolist()
    for first in range(0, len(ids_BL), ROWS):
        some = slice(first, first + ROWS)
        missing = ROWS - len(ids_BL[some])  # empty rows fill the last batch up, so that one program serves all
        ids, mask = (np.pad(array[some], ((0, missing), (0, 0))) for array in (ids_BL, mask_BL))
        rows = sets.unlabelled(folder, ids, mask, [image for line in chosen[some] for image in line])
        yield sets.batch(folder, rows, room=int(tags_B.max()))


def _summed(counted: list[dict[str, routing.Counts]]) -> dict[str, routing.Counts]:
    return jax.tree.map(lambda *parts: np.sum([np.asarray(part, np.int64) for part in parts], axis=0), *counted)


def test_growth_is_the_released_initialisation_bit_for_bit(folder: Path):
    _, arrays, config = sets.model(folder, "vision_gate")
    _, init, extended = sets.model(folder, "moextend_init")
    twins = {layer: source for layer, source, _ in equal_columns(init, extended)}
    assert extended.extension is not None and tuple(twins) == extended.extension.layers
    if "expert_idx" in (facts := sets.manifest(folder)):
        assert twins == dict(zip(facts["add_layer"], facts["expert_idx"], strict=True))
    extension = ExtensionConfig(layers=tuple(twins), sources=tuple(twins.values()))
    grown = grow(arrays, config=with_extension(config, extension), recipe=sets.RELEASED, seed=0)
    assert set(grown) == set(init) - set(arrays)
    for path, leaf in {**arrays, **grown}.items():
        if path.endswith("w_in"):  # random: as many, as wide
            assert leaf.shape == init[path].shape and 0.01 < np.std(leaf) < 0.03
        else:
            np.testing.assert_array_equal(leaf, init[path], err_msg=path)
