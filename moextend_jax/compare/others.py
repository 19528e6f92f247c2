"""Compares the files that are neither a forward pass nor a stage: selection, generation, the vision tower.

In: a `Reference` of that kind and the model or models it belongs to. Out: one `Row` per array of the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from moextend_jax.compare.observe import RELEASED, observer
from moextend_jax.compare.reference import (
    Reference,
    Rows,
    check_fits,
    check_pixels,
    chosen_images,
    pixels_nhwc,
    to_batch,
    to_nhwc,
    whole_numbers,
)
from moextend_jax.compare.verdict import Row, Tolerances, close, left_out
from moextend_jax.config import IGNORE, Batch, MoextendError, Recipe
from moextend_jax.extension import routing
from moextend_jax.generate import Generator
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays
from moextend_jax.models.vision import VisionTower

Arrays = dict[str, jax.Array]

MODES: dict[str, Recipe] = {
    "ascending": RELEASED,
    "top2": dataclasses.replace(RELEASED, counted_picks="top_k"),
}
"""Names in the file: the released code counts the k least likely experts, the paper the k most likely."""
_ROWS = 8


class Counted(NamedTuple):
    before: routing.Counts
    after: routing.Counts


# --- selection --------------------------------------------------------------------------------------------------------


def compare_selection(
    reference: Reference, model: MoExtend, before: Arrays, after: Arrays, *, start: int | None, tolerances: Tolerances
) -> list[Row]:
    """Counts under the aligned model `before` and the probed model `after`, and what is chosen by them."""
    theirs = dict(reference.arrays)
    modes = {key.split("/")[0] for key in theirs if "/" in key}
    batches = list(_sequences(reference, theirs, model, start=start))
    known = {mode: recipe for mode, recipe in MODES.items() if mode in modes}
    counted = _count(model, {"before": before, "after": after}, batches, known)
    found = [left_out("", name, "an input") for name in ("input_ids", "lengths") if theirs.pop(name, None) is not None]
    for mode, recipe in known.items():
        some = {key.partition("/")[2]: theirs.pop(key) for key in list(theirs) if key.startswith(mode + "/")}
        found += _chosen(mode, some, counted[mode], recipe, tolerances)
    return found + [left_out("", key, f"no such mode or quantity; modes are {', '.join(MODES)}") for key in theirs]


def _chosen(
    mode: str, theirs: dict[str, np.ndarray], counted: Counted, recipe: Recipe, tolerances: Tolerances
) -> list[Row]:
    before, after = counted.before.total_ZO, counted.after.total_ZO
    layers = whole_numbers(theirs.get("selected_layers", np.arange(len(before) // 2)), what=f"{mode}/selected_layers")
    if layers.ndim != 1 or len(layers) > len(before):
        raise MoextendError(f"{mode}/selected_layers has shape {layers.shape}, but the model has {len(before)} layers")
    chosen = routing.select(*counted, share=(len(layers) + 0.5) / len(before), recipe=recipe)
    order = np.argsort(layers)
    shares = [routing.shares(counts_ZO) for counts_ZO in (before, after)]
    ours: dict[str, Any] = {
        "counts_before": before,
        "counts_after": after,
        "dist_before": shares[0],
        "dist_after": shares[1],
        "std": chosen.shift_Z,
        "selected_layers": np.asarray(chosen.layers),
        "expert_idxmax": np.asarray(chosen.sources),
        "expert_idxmax_all_layers": shares[recipe.source_under == "after"].argmax(axis=1),
    }
    found = []
    for name, array in theirs.items():
        if name not in ours:
            found.append(left_out(mode, name, "no such quantity is known here"))
            continue
        if name in ("selected_layers", "expert_idxmax"):  # files may rank by d_j; ours ascend
            if array.shape != layers.shape:
                raise MoextendError(f"{mode}/{name} has shape {array.shape}, but {len(layers)} layers are selected")
            array = array[order]
        exact = np.issubdtype(array.dtype, np.integer)
        row = close(mode, name, ours[name], array, atol=0 if exact else tolerances.simple)  # refuses another shape
        found.append(row._replace(agreement=float((ours[name] == array).mean())) if exact else row)
    return found


def _count(
    model: MoExtend, models: dict[str, Arrays], batches: list[Batch], recipes: dict[str, Recipe]
) -> dict[str, Counted]:
    @jax.jit
    def count(arrays: Arrays, batch: Batch) -> dict[str, routing.Counts]:
        whole = with_arrays(model, arrays)
        return {mode: routing.count_picks(whole, batch, recipe=recipe) for mode, recipe in recipes.items()}

    sums: dict[str, Any] = {}
    for name, arrays in models.items():
        counts = [jax.tree.map(lambda part: np.asarray(part, np.int64), count(arrays, batch)) for batch in batches]
        sums[name] = jax.tree.map(lambda *parts: np.sum(parts, axis=0), *counts)
    return {mode: Counted(sums["before"][mode], sums["after"][mode]) for mode in recipes}


def _sequences(
    reference: Reference, theirs: dict[str, np.ndarray], model: MoExtend, *, start: int | None
) -> Iterator[Batch]:
    """The sequences, a few to a batch: padding is not counted, and one row does not change another."""
    if "input_ids" not in theirs:
        raise MoextendError(f"{reference.path} holds no input_ids: there is nothing to count on")
    ids_BL = whole_numbers(theirs["input_ids"], what="input_ids")
    if ids_BL.ndim != 2:
        raise MoextendError(f"{reference.path}: input_ids must be [rows, length]; their shape is {ids_BL.shape}")
    lengths_B = whole_numbers(theirs["lengths"], what="lengths") if "lengths" in theirs else (ids_BL >= 0).sum(axis=1)
    if lengths_B.shape != ids_BL.shape[:1]:
        raise MoextendError(f"{reference.path}: lengths must be one per row; their shape is {lengths_B.shape}")
    mask_BL = (np.arange(ids_BL.shape[1])[None] < lengths_B[:, None]).astype(np.int32)
    ids_BL = np.where(mask_BL > 0, ids_BL, 0)
    pixels, vision = pixels_nhwc(reference), model.config.vision
    tag = start if vision else None
    starts_B = (ids_BL == tag).sum(axis=1) if tag is not None else np.zeros(len(ids_BL), int)
    images: list[tuple[int, ...]] = [()] * len(ids_BL)
    if starts_B.any():
        order = reference.beside["images"].get("selection/image_index")
        if order is None or pixels is None:
            raise MoextendError(f"{reference.folder / 'images.npz'} does not say which image goes where in selection")
        images = _per_row(order, starts_B, count=len(pixels))
    for first in range(0, len(ids_BL), _ROWS):
        some = slice(first, first + _ROWS)
        short = _ROWS - len(ids_BL[some])  # empty rows fill the last batch up, so that one program serves all
        grown = [np.pad(array[some], ((0, short), (0, 0))) for array in (ids_BL, mask_BL)]
        chosen = tuple(image for row in images[some] for image in row)
        rows = Rows(grown[0], np.full_like(grown[0], IGNORE), grown[1], chosen, pixels if starts_B.any() else None)
        check_fits(rows, model.config, name="selection")
        yield to_batch(rows, start=tag, patches=vision.patches if vision else 0, room=int(starts_B.max()))


def _per_row(order: np.ndarray, starts_B: np.ndarray, *, count: int) -> list[tuple[int, ...]]:
    """Images of every row, from a line per row (-1: none) or from one number per start tag."""
    order = np.atleast_1d(order)
    if len(order) == len(starts_B):
        images = [chosen_images(row, count=count) for row in order]
    else:
        ends = np.cumsum(starts_B)
        images = [chosen_images(order[end - n : end], count=count) for n, end in zip(starts_B, ends, strict=True)]
    if [len(some) for some in images] != starts_B.tolist():
        raise MoextendError("selection/image_index does not name one image per image start tag")
    return images


# --- generation -------------------------------------------------------------------------------------------------------


def compare_generation(
    reference: Reference, model: MoExtend, arrays: Arrays, *, start: int | None, tolerances: Tolerances
) -> list[Row]:
    """Greedy tokens, with a cache and by one forward pass over them, and the logits that chose them."""
    theirs = dict(reference.arrays)
    if missing := {"prompt", "tokens_cache"} - theirs.keys():
        raise MoextendError(f"{reference.path} lacks {', '.join(sorted(missing))}")
    vocabulary = model.config.decoder.vocab_size
    for name in ("prompt", "tokens_cache", "tokens_nocache"):
        if name in theirs:
            theirs[name] = _tokens(theirs[name], what=name, vocabulary=vocabulary)
    prompt = theirs.pop("prompt")
    length, new = prompt.shape[1], theirs["tokens_cache"].shape[1] - prompt.shape[1]
    if new < 1 or length < 1:
        raise MoextendError(f"{reference.path}: tokens_cache must be the prompt and at least one token after it")
    suppress = () if start is None else tuple(range(start, model.config.decoder.vocab_size))
    generator = Generator(model, eos=-1, suppress=suppress)

    def batch(ids_BL: np.ndarray) -> Batch:
        vision = model.config.vision
        tag = start if vision else None
        images = _pictured(reference, prompt, tag)
        rows = Rows(ids_BL, np.full_like(ids_BL, IGNORE), np.ones_like(ids_BL), images, pixels_nhwc(reference))
        rows = rows if images else rows._replace(pixels_nhwc=None)
        return jax.tree.map(jax.numpy.asarray, to_batch(rows, start=tag, patches=vision.patches if vision else 0))

    found = [left_out("", "prompt", "an input")]
    written = np.concatenate([prompt, generator.complete(arrays, batch(prompt), max_new_tokens=new)], axis=1)
    whole = theirs.get("tokens_nocache", theirs["tokens_cache"])
    observe = observer(model, aux_coefficient=0.0, inside=False)
    logits_BLV = observe(arrays, batch(whole))["logits"][:, length - 1 :]
    for name, array in theirs.items():
        if name == "tokens_cache":
            found.append(_same_tokens(name, written, array))
        elif name == "tokens_nocache":
            likely_BLV = logits_BLV[:, :-1].copy()
            likely_BLV[..., list(suppress)] = -np.inf
            found.append(_same_tokens(name, np.concatenate([prompt, likely_BLV.argmax(-1)], axis=1), array))
        elif name == "logits_last":
            if array.ndim == 2:
                array = array[None]
            if array.ndim != 3:
                raise MoextendError(f"logits_last must be [rows, places, vocabulary]; its shape is {array.shape}")
            found.append(close("", name, logits_BLV[:, : array.shape[1]], array, atol=tolerances.composed))
        else:
            found.append(left_out("", name, "no such quantity is known here"))
    return found


def _tokens(array: np.ndarray, *, what: str, vocabulary: int) -> np.ndarray:
    ids_BL = whole_numbers(array, what=what)
    if ids_BL.ndim != 2 or (ids_BL.size and not 0 <= ids_BL.min() <= ids_BL.max() < vocabulary):
        raise MoextendError(f"{what} must be [rows, length] of ids below {vocabulary}; its shape is {ids_BL.shape}")
    return ids_BL


def _same_tokens(name: str, ours: np.ndarray, theirs: np.ndarray) -> Row:
    row = close("", name, ours, theirs, atol=0)
    return row._replace(agreement=float((ours == theirs).mean()))


def _pictured(reference: Reference, prompt: np.ndarray, start: int | None) -> tuple[int, ...]:
    """Images of the prompt: as images.npz says, or those whose file names stand in bytes behind the start tags."""
    places = list(zip(*np.nonzero(prompt == start), strict=True)) if start is not None else []
    if not places:
        return ()
    assert start is not None
    order = reference.beside["images"].get("generate/image_index")
    if order is not None:
        pixels = pixels_nhwc(reference)
        return chosen_images(order, count=0 if pixels is None else len(pixels))
    images = []
    for row, place in places:
        ids = prompt[row, place + 1 :].tolist()
        ids = ids[: ids.index(start + 1)] if start + 1 in ids else ids
        name = bytes(piece for piece in ids if piece < 256).decode(errors="replace")
        if name not in reference.image_names:
            raise MoextendError(f"the prompt shows image {name!r}, which manifest.json does not list")
        images.append(reference.image_names.index(name))
    return tuple(images)


# --- vision tower -----------------------------------------------------------------------------------------------------


def compare_tower(reference: Reference, tower: VisionTower, arrays: Arrays, *, tolerances: Tolerances) -> list[Row]:
    """Hidden states of the tower, for every `pixel_values` in the file; `arrays` by the tower's own paths."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in reference.arrays.items():
        head, slash, rest = key.partition("/")
        group, name = ("", key) if not slash or head == "hidden_states" else (head, rest)
        groups.setdefault(group, {})[name] = array

    @jax.jit
    def run(arrays: Arrays, images_nhwc):
        whole = with_arrays(tower, arrays)
        states = [whole.hidden_state(images_nhwc, layer=layer) for layer in range(tower.config.layers + 1)]
        return states, whole.pooled(images_nhwc)

    found = []
    for group, theirs in groups.items():
        if "pixel_values" not in theirs:
            found += [left_out(group, name, "it comes with no pixel_values") for name in theirs]
            continue
        pixels = to_nhwc(theirs.pop("pixel_values"))
        check_pixels(pixels, tower.config)
        states, pooled = run(arrays, pixels)
        ours: dict[str, Any] = {f"hidden_states/{u}": state for u, state in enumerate(states)}
        ours |= {f"patch_m{u}": states[-u][:, 1:] for u in range(1, len(states) + 1)}
        ours |= {"last_hidden_state": states[-1], "pooler_output": pooled}
        found.append(left_out(group, "pixel_values", "an input"))
        for name, array in theirs.items():
            if name not in ours:
                found.append(left_out(group, name, f"the tower has {tower.config.layers} layers and no such quantity"))
            else:
                found.append(close(group, name, ours[name], array, atol=tolerances.simple))
    return found
