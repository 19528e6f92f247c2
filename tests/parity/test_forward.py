"""Forward passes: every array that the reference holds of one equals ours, top-k exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moextend_jax.compare.forward import compare_forward, equal_columns
from moextend_jax.compare.verdict import Tolerances
from moextend_jax.parameters import with_arrays
from parity import sets

pytestmark = pytest.mark.smoke

WITHOUT_VALUE = {"loss_ce", "loss_total", "loss_aux_nomask"}
"""Undefined where labels follow left padding, or where the released extended model counts no token at all."""


@pytest.mark.parametrize("file", sets.FORWARD)
def test_every_array_of_a_forward_pass(folder: Path, file: str):
    reference, (_, arrays, config) = sets.reference(folder, file), sets.model(folder, sets.FORWARD[file])
    rows = compare_forward(
        reference,
        config,
        arrays,
        observe=sets.observe(folder, config),
        start=sets.start(folder),
        tolerances=Tolerances(sets.SIMPLE, sets.COMPOSED),
    )
    names = {f"{row.batch}/{row.quantity}": row for row in rows}
    assert set(names) == {key if key in names else f"text/{key}" for key in reference.arrays}
    assert not [row for row in rows if row.verdict == "differs"]
    unknown = [row for row in rows if row.verdict == "not compared" and row.quantity not in WITHOUT_VALUE]
    assert not unknown
    tied = {f"topk_idx/{layer}" for layer, _, _ in equal_columns(arrays, config)}
    for row in rows:
        if row.quantity.startswith("topk_idx/") and row.quantity not in tied:
            assert row.agreement == 1.0, row


@pytest.mark.parametrize("name", ["vision", "moextend_pert"])
def test_features_from_a_frozen_tower_are_spliced_in_as_pixels_are(folder: Path, name: str):
    """What a cache of features holds, in place of pixels, gives the reference's embeddings."""
    theirs = sets.arrays(folder, f"forward_{name}")
    wanted = [f"train0/{key}" for key in ("clip_patch_features", "img_pos", "hidden_states/0")]
    if missing := [key for key in wanted if key not in theirs]:
        pytest.skip(f"forward_{name}.npz holds no {missing[0]}")
    features_nPC, places, embedded_BLD = (theirs[key] for key in wanted)
    structure, arrays, _ = sets.model(folder, name)
    batch = sets.batches(folder, ("train0",))["train0"]
    features_BMPC = np.zeros((*batch.media["image"].shape[:2], *features_nPC.shape[1:]), np.float32)
    slots = dict.fromkeys(range(len(batch.ids_BL)), 0)
    for features_PC, (row, _, _) in zip(features_nPC, places, strict=True):
        features_BMPC[row, slots[row]] = features_PC
        slots[row] += 1
    cached = batch._replace(media={}, features={"image": features_BMPC})
    x_BLD = with_arrays(structure, arrays).embed(cached)
    np.testing.assert_allclose(x_BLD, embedded_BLD, atol=sets.SIMPLE, rtol=0)
