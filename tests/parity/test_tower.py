"""The vision tower: every hidden state, for every batch of pixels that the reference holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moextend_jax.checkpoints.leaves import read_sharded
from moextend_jax.checkpoints.source import open_source
from moextend_jax.compare.reference import to_nhwc
from moextend_jax.models.moextend import abstract
from moextend_jax.parameters import with_arrays
from parity import sets

pytestmark = pytest.mark.smoke


def test_hidden_states_and_features(folder: Path):
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in sets.arrays(folder, "clip").items():
        head, slash, rest = key.partition("/")
        group, name = ("", key) if not slash or head == "hidden_states" else (head, rest)
        groups.setdefault(group, {})[name] = array
    pictures = sets.arrays(folder, "images")
    if "clip_patch_features" in pictures:
        groups["images.npz"] = {"pixel_values": pictures["pixel_values"], "patch_m1": pictures["clip_patch_features"]}
    source = open_source(folder / "clip")
    tower = abstract(source.config).media["image"].tower
    assert tower is not None and source.parts == {"vision"}
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = read_sharded(source.leaves, dict.fromkeys(source.leaves, device), dtype="float32")
    arrays = {path.removeprefix("media/image/tower/"): leaf for path, leaf in placed.items()}

    @jax.jit
    def run(arrays, images_nhwc) -> dict[str, Any]:
        model = with_arrays(tower, arrays)
        states = [model.hidden_state(images_nhwc, layer=layer) for layer in range(tower.config.layers + 1)]
        ours = {f"hidden_states/{layer}": state for layer, state in enumerate(states)}
        ours |= {f"patch_m{back}": states[-back][:, 1:] for back in range(1, len(states) + 1)}
        return ours | {"last_hidden_state": states[-1], "pooler_output": model.post_norm(states[-1][:, :1])[:, 0]}

    pixels_nchw = [theirs.pop("pixel_values") for theirs in groups.values()]
    ours = run(arrays, to_nhwc(np.concatenate(pixels_nchw)))  # at once: one compiled program
    ends = np.cumsum([len(images) for images in pixels_nchw])
    for (group, theirs), images, end in zip(groups.items(), pixels_nchw, ends, strict=True):
        for name, array in theirs.items():  # an array that is unknown has nothing of ours
            mine = ours[name][end - len(images) : end]
            np.testing.assert_allclose(mine, array, atol=sets.SIMPLE, rtol=0, err_msg=f"{group}/{name}")
