"""Reads what another implementation wrote of a forward pass: one npz file of arrays, and the batches they belong to.

In: the path of that file; `batches.npz` (ids, labels, masks, as tools/dump_torch_routing.py writes them), and for
models that see `images.npz` (pixels, and which image goes where) and `manifest.json` (`spec`: the first image tag,
the loss coefficient) lie beside it. Out: its arrays, and our `Batch`es.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import einops
import numpy as np

from moextend_jax.checkpoints.npz import read_npz, whole_numbers
from moextend_jax.checkpoints.tensors import name_list
from moextend_jax.config import IGNORE, IMAGE, Batch, ModelConfig, MoextendError
from moextend_jax.data.conversations import text_batch
from moextend_jax.folders import local
from moextend_jax.outside import parse_json, read_small, shown

BATCH_OF_NONE = "text"
"""The batch of arrays that name none (plain transformers on text)."""
FORWARD = (
    "logits", "logits_eager", "hidden_states", "router_logits", "topk_idx", "topk_prob", "topk_calibrated",
    "topk_weight", "moe_in", "moe_out", "image_features", "clip_patch_features", "pixel_values", "img_pos",
    "loss_total", "loss_ce", "loss_aux", "loss_aux_nomask",
)  # fmt: skip
"""First part of the name of every array that a forward pass is known by."""


class Reference(NamedTuple):
    """`arrays`: all of the file, by name. `beside`: batches.npz and images.npz. `spec`: facts of manifest.json."""

    path: Path
    arrays: dict[str, np.ndarray]
    beside: dict[str, dict[str, np.ndarray]]
    spec: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.path.parent


class Rows(NamedTuple):
    """Token rows of one batch. images: positions in `pixels_nhwc`, one per image start tag, row by row. masked: the
    file has no values where the mask is 0."""

    ids_BL: np.ndarray
    labels_BL: np.ndarray
    mask_BL: np.ndarray
    images: tuple[int, ...]
    pixels_nhwc: np.ndarray | None
    masked: bool = False


def read_reference(path: Path) -> Reference:
    """Raises MoextendError for whatever is no file of a forward pass."""
    if local(path, what="a reference").is_dir():
        files = ", ".join(sorted(file.name for file in path.glob("*.npz")))
        raise MoextendError(f"{path} is a folder; name one of its files ({files or 'it holds no .npz'})")
    arrays = read_npz(path)
    if str(arrays.get("format", "")).startswith("moextend-routing/"):
        raise MoextendError(f"{path} holds routing statistics: moextend routing compare {path} OTHER.npz")
    parts = {part for key in arrays for part in key.split("/")}
    if not parts & {"logits", "router_logits", "hidden_states"}:
        raise MoextendError(
            f"{path} holds none of the arrays of a forward pass (logits, router_logits/L, hidden_states/L); it holds "
            f"{name_list(sorted(arrays)) or 'nothing'}"
        )
    beside = {name: path.parent / f"{name}.npz" for name in ("batches", "images")}
    at = path.parent / "manifest.json"
    manifest = parse_json(read_small(at), where=f"{at} is not JSON") if at.is_file() else {}
    spec = manifest.get("spec", {}) if isinstance(manifest, dict) else None
    if not isinstance(spec, dict):
        raise MoextendError(f"{at} holds no facts of a reference")
    return Reference(
        path,
        _numeric(path, arrays),
        {name: _numeric(file, read_npz(file)) if file.is_file() else {} for name, file in beside.items()},
        spec,
    )


def _numeric(path: Path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if texts := [name for name, array in arrays.items() if array.dtype.kind == "U"]:
        raise MoextendError(f"{path}: {name_list(texts)} is text, where numbers are compared")
    return arrays


def rows_of(reference: Reference, name: str, *, start: int | None) -> Rows:
    """Batch `name` of batches.npz. `start` is the id of the image start tag; None: there are no images."""
    batches, at = reference.beside["batches"], reference.folder / "batches.npz"
    if f"{name}/input_ids" not in batches:
        known = sorted({key.split("/")[0] for key in batches})
        raise MoextendError(f"{at} holds no batch {name!r}; it holds {known or 'nothing'}")
    ids_BL = whole_numbers(batches[f"{name}/input_ids"], what=f"{at}: {name}/input_ids")
    labels_BL = batches.get(f"{name}/labels", np.full_like(ids_BL, IGNORE))
    labels_BL = whole_numbers(labels_BL, what=f"{at}: {name}/labels")
    mask_BL = batches.get(f"{name}/attention_mask", np.ones_like(ids_BL))
    if ids_BL.ndim != 2 or labels_BL.shape != ids_BL.shape or mask_BL.shape != ids_BL.shape:
        shapes = ids_BL.shape, labels_BL.shape, mask_BL.shape
        raise MoextendError(f"batch {name!r}: ids, labels and mask must be [B, L] alike; their shapes are {shapes}")
    tags = 0 if start is None else int((ids_BL == start).sum())
    images, pixels_nhwc = _images(reference, name) if tags else ((), None)
    if len(images) != tags:
        raise MoextendError(f"batch {name!r} has {tags} image start tags but {len(images)} images")
    masked = reference.spec.get("padding") == "masked"
    return Rows(ids_BL, labels_BL, (mask_BL != 0).astype(np.int32), images, pixels_nhwc, masked)


def check_fits(rows: Rows, config: ModelConfig, *, name: str) -> None:
    """Refuses token ids that the model has no embedding for, which a gather would replace by others, and images of
    another size than its tower's."""
    real = rows.ids_BL[rows.mask_BL > 0]
    if real.size and not 0 <= real.min() <= real.max() < config.decoder.vocab_size:
        raise MoextendError(
            f"batch {name!r} has ids from {real.min()} to {real.max()}, but the vocabulary has "
            f"{config.decoder.vocab_size}"
        )
    if rows.pixels_nhwc is None or config.vision is None:
        return
    image_hwc, size_hwc = list(rows.pixels_nhwc.shape[1:]), [config.vision.image_size, config.vision.image_size, 3]
    if image_hwc != size_hwc:
        raise MoextendError(f"images are {image_hwc} (height, width, channels), the vision tower takes {size_hwc}")


def to_batch(rows: Rows, *, start: int | None, patches: int, room: int = 0) -> Batch:
    """Our form of the rows (`text_batch`), with room for at least `room` images per row."""
    B, L = rows.ids_BL.shape
    places_BL = np.full((B, L), -1, np.int32)
    places = image_places(rows.ids_BL, start=start, patches=patches)
    most = max([room, *(sum(row == place[0] for place in places) for row in range(B))])
    images_BMhwc, seen = None, dict.fromkeys(range(B), 0)
    if rows.pixels_nhwc is not None and most:
        images_BMhwc = np.zeros((B, most, *rows.pixels_nhwc.shape[1:]), np.float32)
    for image, (row, first, end) in zip(rows.images, places, strict=True):
        assert images_BMhwc is not None and rows.pixels_nhwc is not None
        places_BL[row, first + 1 : end] = np.arange(patches) + seen[row] * patches
        images_BMhwc[row, seen[row]] = rows.pixels_nhwc[image]
        seen[row] += 1
    media = {} if images_BMhwc is None else {IMAGE: images_BMhwc}
    text = text_batch(rows.ids_BL, rows.mask_BL)
    return text._replace(labels_BL=rows.labels_BL, places_BL=places_BL, media=media)


def image_places(ids_BL: np.ndarray, *, start: int | None, patches: int) -> list[tuple[int, int, int]]:
    """(row, place of the start tag, place of the end tag) of every image, row by row."""
    if start is None:
        return []
    places = []
    for row, first in zip(*np.nonzero(ids_BL == start), strict=True):
        end = first + patches + 1
        if end >= ids_BL.shape[1] or ids_BL[row, end] != start + 1:
            raise MoextendError(
                f"row {row}: no image end tag ({start + 1}) {patches + 1} places after the start tag ({start}) at "
                f"{first}; is this the vision tower of the reference ({patches} patches)?"
            )
        places.append((int(row), int(first), int(end)))
    return places


def most_images(batches: Iterable[Rows], *, start: int | None) -> int:
    """Images of the row that has most of them; 0 without a start tag."""
    counts = [int((rows.ids_BL == start).sum(axis=1).max(initial=0)) for rows in batches if start is not None]
    return max(counts, default=0)


def start_tag(reference: Reference, *, given: int | None, attributes: Mapping[str, Any]) -> int | None:
    """The id of the image start tag: as given, or the manifest's, or config.json's, or what `img_pos` points at."""
    visual = attributes.get("visual")
    visual = visual if isinstance(visual, dict) else {}
    for value in (given, reference.spec.get("image_start_id"), visual.get("image_start_id")):
        if type(value) is int:
            if not 0 <= value < 1 << 31:
                raise MoextendError(f"the image start tag cannot have the id {shown(value)}")
            return value
    for key, places in reference.arrays.items():
        name, _, last = key.rpartition("/")
        ids_BL = reference.beside["batches"].get(f"{name}/input_ids")
        if last != "img_pos" or ids_BL is None or not places.size:
            continue
        places = whole_numbers(places, what=f"{reference.path}: {key}")
        first = tuple(places[0, :2]) if places.ndim == 2 and places.shape[1] == 3 else ()
        inside = len(first) == ids_BL.ndim == 2 and all(0 <= at < n for at, n in zip(first, ids_BL.shape, strict=True))
        if not inside:
            raise MoextendError(f"{reference.path}: {key} names no place in {name}/input_ids")
        return int(whole_numbers(ids_BL, what=f"{reference.folder / 'batches.npz'}: {name}/input_ids")[first])
    return None


def to_nhwc(pixels_nchw: np.ndarray) -> np.ndarray:
    if pixels_nchw.ndim != 4:
        raise MoextendError(f"pixel_values has shape {pixels_nchw.shape}, expected [images, channels, height, width]")
    return einops.rearrange(pixels_nchw, "n c h w -> n h w c").astype(np.float32)


def chosen_images(order: np.ndarray, *, count: int) -> tuple[int, ...]:
    """Image numbers row by row; -1 stands for none."""
    order = whole_numbers(order, what="image_index").reshape(-1)
    images = tuple(int(image) for image in order if image >= 0)
    if images and max(images) >= count:
        raise MoextendError(f"image_index names image {max(images)}, but images.npz holds {count} images")
    return images


def _images(reference: Reference, name: str) -> tuple[tuple[int, ...], np.ndarray]:
    images = reference.beside["images"]
    if f"{name}/image_index" in images and "pixel_values" in images:
        pixels_nhwc = to_nhwc(images["pixel_values"])
        return chosen_images(images[f"{name}/image_index"], count=len(pixels_nhwc)), pixels_nhwc
    own = reference.arrays.get(f"{name}/pixel_values")  # in the order of the start tags
    if own is None:
        raise MoextendError(
            f"batch {name!r} has images, but {reference.folder / 'images.npz'} does not say which "
            f"({name}/image_index and pixel_values), nor does {reference.path.name} hold {name}/pixel_values"
        )
    return tuple(range(len(own))), to_nhwc(own)
