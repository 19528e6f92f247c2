"""What goes in: pictures and conversations, prepared as the released code does it; and nothing in a folder is unknown.

A file or an array that no test of this package compares fails here, by name.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest

from moextend_jax.config import IGNORE, ImageTags
from moextend_jax.data.conversations import encode_conversation
from moextend_jax.data.tokenizer import load_tokenizer
from moextend_jax.media.image import decode_image, prepare_image
from parity import sets
from parity.test_stages import STAGES

pytestmark = pytest.mark.smoke

LEGACY = ("True", "False")
FILES = {
    *sets.FORWARD, *(f"stage_{name}" for name in STAGES), "batches", "images", "selection", "clip", "generate",
    *(f"tokenizer/preprocess_legacy{legacy}" for legacy in LEGACY),
}  # fmt: skip
INPUTS = {
    "batches": r"[^/]+/(input_ids|labels|attention_mask)",
    "images": r"pixel_values|clip_patch_features|[^/]+/image_index",
}


def test_no_file_and_no_input_is_unknown(folder: Path):
    files = {file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.npz")}
    assert not files - FILES
    models = {file.parent.name for file in folder.rglob("*.safetensors")}
    assert not models - {*oracle.MODELS, "clip"}
    for name, known in INPUTS.items():
        assert not [key for key in sets.arrays(folder, name) if not re.fullmatch(known, key)]


def test_cropped_pictures(folder: Path):
    if not (folder / "images").is_dir():
        pytest.skip(f"{folder} holds no images/")
    names, pixels_nchw = sets.manifest(folder)["images"], sets.arrays(folder, "images")["pixel_values"]
    assert sorted(names) == sorted(file.name for file in (folder / "images").iterdir())
    for name, image_chw in zip(names, pixels_nchw, strict=True):
        image = decode_image((folder / "images" / name).read_bytes())
        ours_hwc = prepare_image(image, size=image_chw.shape[-1], preparation="crop")
        np.testing.assert_allclose(ours_hwc, image_chw.transpose(1, 2, 0), atol=sets.SIMPLE, rtol=0)


@pytest.mark.parametrize("legacy", LEGACY)
def test_the_released_template(folder: Path, legacy: str):
    wanted, own = sets.arrays(folder, f"tokenizer/preprocess_legacy{legacy}"), folder / "tokenizer"
    facts = json.loads((own / f"tokenizer_oracle_legacy{legacy}.json").read_text())
    start, end, pad = facts["image_ids"]
    tokenizer = load_tokenizer(own, tags=ImageTags(start=start, end=end, pad=pad))
    for row, turns in enumerate(facts["conversations"]):
        ours = encode_conversation(
            [
                {"from": ("human", "gpt")[place % 2], "value": _without_paths(turn["value"])}
                for place, turn in enumerate(turns)
            ],
            example_id=str(row),
            items={"image": [facts["image_token_span"]] * sum(turn["value"].count("</image>") for turn in turns)},
            tokenizer=replace(tokenizer, legacy=legacy == "True"),
            recipe=replace(sets.RELEASED, turns="all"),
        )
        room = slice(0, facts["max_len"])
        surplus = (0, max(0, facts["max_len"] - len(ours.ids_L)))
        ids_L = _without_path_bytes(wanted["input_ids"][row], start, end, pad)
        np.testing.assert_array_equal(np.pad(ours.ids_L[room], surplus, constant_values=facts["pad"]), ids_L)
        labels_L = np.pad(ours.labels_L[room], surplus, constant_values=IGNORE)
        np.testing.assert_array_equal(labels_L, wanted["labels"][row])
        np.testing.assert_array_equal(np.pad(ours.segments_L[room], surplus), wanted["attention_mask"][row])
    assert set(wanted) == {"input_ids", "labels", "attention_mask"}


def _without_paths(text: str) -> str:
    return re.sub("<image>.*?</image>", "<image>", text, flags=re.DOTALL)


def _without_path_bytes(ids_L: np.ndarray, start: int, end: int, pad: int) -> np.ndarray:
    """The released code hides the file name in an image's first pad positions."""
    ids_L, inside = ids_L.copy(), False
    for place, token in enumerate(ids_L):
        inside = (inside or token == start) and token != end
        if inside and token != start:
            ids_L[place] = pad
    return ids_L
