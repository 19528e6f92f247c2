"""Compares a forward pass, batch by batch: logits, losses, routing, hidden states, image features.

In: a `Reference`, a model's parameters and its compiled forward pass. Out: one `Row` per array of the file. What a
position that sees no token holds is nobody's business: padding on the left differs between attention back ends, so
there only real tokens are compared. Where router logits tie, rounding decides the top-k, so picks of tied tokens are
not compared.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from moextend_jax.checkpoints.npz import whole_numbers
from moextend_jax.compare.observe import Observe
from moextend_jax.compare.reference import (
    BATCH_OF_NONE,
    FORWARD,
    Reference,
    Rows,
    check_fits,
    image_places,
    most_images,
    rows_of,
    to_batch,
)
from moextend_jax.compare.verdict import Row, Tolerances, close, left_out
from moextend_jax.config import IGNORE, ModelConfig, MoextendError

_SIMPLE = {"loss_total", "loss_ce", "loss_aux", "loss_aux_nomask", "image_features", "clip_patch_features",
           "pixel_values"}  # fmt: skip
_PER_POSITION = {"logits", "logits_eager", "hidden_states", "moe_in", "moe_out"}


UNKNOWN = "no such quantity is known here"


def is_inside(reference: Reference) -> bool:
    """Does the file hold what only a pass layer by layer shows?"""
    parts = {part for key in reference.arrays for part in key.split("/")}
    return bool(parts & {"hidden_states", "moe_in", "moe_out", "topk_calibrated"})


def compare_forward(
    reference: Reference,
    config: ModelConfig,
    arrays: dict[str, jax.Array],
    *,
    observe: Observe,
    start: int | None,
    tolerances: Tolerances,
) -> list[Row]:
    """`observe` is the forward pass of the model that `config` and `arrays` make (observe.py)."""
    by_batch: dict[str, dict[str, np.ndarray]] = {}
    for key, array in reference.arrays.items():
        head, _, rest = key.partition("/")
        name, quantity = (BATCH_OF_NONE, key) if head in FORWARD else (head, rest)
        by_batch.setdefault(name, {})[quantity] = array
    known = {key.split("/")[0] for key in reference.beside["batches"]}
    if not known & set(by_batch):
        raise MoextendError(
            f"{reference.path.name} is of the batches {', '.join(sorted(by_batch))}; "
            f"{reference.folder / 'batches.npz'} holds {', '.join(sorted(known)) or 'none'}"
        )
    patches = config.vision.patches if config.vision else 0
    tag = start if patches else None
    if not patches and any(f"{name}/image_index" in reference.beside["images"] for name in by_batch):
        raise MoextendError("the reference has images, but the checkpoint no vision tower: give one with --vision DIR")
    rows = {name: rows_of(reference, name, start=tag) for name in by_batch if name in known}
    for name in rows:
        if patches and not rows[name].images and by_batch[name].get("pixel_values", np.empty(0)).size:
            tagged = "nothing says which token it is: give --image_start ID" if tag is None else f"its id is {tag}"
            raise MoextendError(
                f"batch {name!r} has pixel_values, but no image start tag says where they stand; {tagged}"
            )
        check_fits(rows[name], config, name=name)
    room = most_images(rows.values(), start=tag)
    verdicts: list[Row] = []
    for name, theirs in by_batch.items():
        if name not in rows:
            verdicts += [left_out(name, quantity, f"batches.npz holds no batch {name!r}") for quantity in theirs]
            continue
        places = image_places(rows[name].ids_BL, start=tag, patches=patches)
        pictured = rows[name]
        if pictured.pixels_nhwc is None and room:  # one compiled program serves batches with and without images
            some = next(batch.pixels_nhwc for batch in rows.values() if batch.pixels_nhwc is not None)
            pictured = pictured._replace(pixels_nhwc=some)
        ours = observe(arrays, to_batch(pictured, start=tag, patches=patches, room=room))
        _add_what_is_given(ours, pictured, places, room=room)
        verdicts += _judge(name, ours, theirs, rows[name], config=config, tolerances=tolerances)
    return verdicts


def equal_columns(arrays: dict[str, jax.Array], config: ModelConfig) -> list[tuple[int, int, int]]:
    """(layer, expert, expert) of router columns that are bitwise equal, as a new column is when it is made."""
    gate_ZDE = np.asarray(arrays["decoder/layers/moe/gate"])
    twins = []
    for z, gate_DE in zip(config.decoder.routed, gate_ZDE, strict=True):
        columns = list(enumerate(gate_DE.T))
        for name, of in config.extensions.items():
            if z in of.layers:
                new_YDX = np.asarray(arrays[f"extensions/{name}/router/new_gate"])
                columns += zip(config.columns(name), new_YDX[of.layers.index(z)].T, strict=True)
        first: dict[bytes, int] = {}
        for o, column in columns:
            twin = first.setdefault(np.ascontiguousarray(column, np.float32).tobytes(), o)
            if twin != o:
                twins.append((z, twin, o))
    return twins


def chosen_otherwise(config: ModelConfig) -> bool:
    """Whether experts are chosen by something else than their logits."""
    return config.decoder.selection_bias or config.decoder.groups > 1


def ties(logits_TO: np.ndarray, *, top_k: int, noise: float) -> np.ndarray:
    """Tokens, [T] bool, whose k-th and k+1-th largest logits (or what else experts are chosen by), or two of the k
    largest, are closer than `noise`."""
    ordered_TO = -np.sort(-logits_TO.astype(np.float64), axis=-1)
    return np.any(-np.diff(ordered_TO[:, : top_k + 1], axis=-1) < noise, axis=-1)


def defined(rows: Rows) -> tuple[np.ndarray, bool]:
    """Places whose values the attention mask defines, [B, L], and whether the cross-entropy reads only such places. A
    row that begins with padding has positions that see nothing: there only its real tokens count."""
    real_BL = rows.mask_BL > 0
    where_BL = real_BL | (rows.mask_BL[:, :1] > 0)
    labelled_BL = rows.labels_BL[:, 1:] != IGNORE
    return real_BL if rows.masked else where_BL, bool(where_BL[:, :-1][labelled_BL].all())


def _judge(
    name: str,
    ours: dict[str, Any],
    theirs: dict[str, np.ndarray],
    rows: Rows,
    *,
    config: ModelConfig,
    tolerances: Tolerances,
) -> list[Row]:
    where_BL, ce_defined = defined(rows)
    where_T = where_BL.reshape(-1)
    if chosen_otherwise(config):
        theirs = {**theirs, **_in_our_order(ours, theirs)}
    verdicts = []
    for quantity, array in theirs.items():
        head, _, index = quantity.partition("/")
        embedded = quantity == "hidden_states/0" and config.vision is None  # pictures went through a tower
        atol = tolerances.simple if head in _SIMPLE or embedded else tolerances.composed
        if head not in FORWARD:
            verdicts.append(left_out(name, quantity, UNKNOWN))
        elif why := _no_value(quantity, array, config, everywhere=bool(where_BL.all()), ce_defined=ce_defined):
            verdicts.append(left_out(name, quantity, why))
        elif (mine := ours.get("logits" if head == "logits_eager" else quantity)) is None:
            verdicts.append(left_out(name, quantity, _why_absent(name, quantity, config)))
        elif head in _PER_POSITION:
            verdicts.append(close(name, quantity, mine, array, atol=atol, where=where_BL))
        elif head in ("router_logits", "topk_prob"):  # probabilities are sorted: no matter whose they are
            verdicts.append(close(name, quantity, mine, array, atol=atol, where=where_T))
        elif head.startswith("topk_"):
            key = f"router_logits/{index}"
            logits_TO = theirs[key] if key in theirs else ours[key]
            if logits_TO.shape != ours[key].shape:
                close(name, key, ours[key], logits_TO, atol=0)  # raises: says which shapes
            # The reference holds no scores by which experts were chosen, where those are not its logits.
            chosen_by_TO = ours[f"chosen_by/{index}"] if chosen_otherwise(config) else logits_TO
            tied_T = ties(chosen_by_TO, top_k=config.decoder.top_k, noise=tolerances.tie)
            if head == "topk_idx":
                scores_TO = chosen_by_TO if chosen_otherwise(config) else np.asarray(jax.nn.softmax(ours[key], axis=-1))
                row = _picks(name, quantity, mine, array, scores_TO, where_T=where_T, tied_T=tied_T, atol=atol)
            else:
                note = _tied_note(tied_T & where_T, where_T)
                row = close(name, quantity, mine, array, atol=atol, where=where_T & ~tied_T, note=note)
            verdicts.append(row)
        else:
            verdicts.append(close(name, quantity, mine, array, atol=0 if head == "img_pos" else atol))
    return verdicts


def _in_our_order(ours: dict[str, Any], theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Their `topk_*`, each token's experts by what they are chosen by here: where that is not the logits, programs
    order them in other ways. What does not fit is left for `_picks` to refuse."""
    ordered = {}
    for quantity, ids_Tk in theirs.items():
        head, _, index = quantity.partition("/")
        if head != "topk_idx" or quantity not in ours or ours[quantity].shape != ids_Tk.shape:
            continue
        chosen_by_TO = ours[f"chosen_by/{index}"]
        ids_Tk = np.clip(ids_Tk.astype(np.int64), 0, chosen_by_TO.shape[1] - 1)
        order_Tk = np.argsort(-np.take_along_axis(chosen_by_TO, ids_Tk, axis=-1), axis=-1, kind="stable")
        for name in (f"{part}/{index}" for part in ("topk_idx", "topk_prob", "topk_weight", "topk_calibrated")):
            if name in theirs and theirs[name].shape == order_Tk.shape:
                ordered[name] = np.take_along_axis(theirs[name], order_Tk, axis=-1)
    return ordered


def _picks(
    name: str, quantity: str, ours_Tk, theirs_Tk, scores_TO, *, where_T: np.ndarray, tied_T: np.ndarray, atol: float
) -> Row:
    """Top-k agreement of the untied tokens; the difference is what following the other's picks would cost, in
    probability or what else experts are chosen by, and holds for tied tokens too."""
    if ours_Tk.shape != theirs_Tk.shape:
        return close(name, quantity, ours_Tk, theirs_Tk, atol=0)  # raises: says which shapes
    theirs_Tk = whole_numbers(theirs_Tk, what=f"{name}/{quantity}")
    if theirs_Tk.min(initial=0) < 0 or theirs_Tk.max(initial=0) >= scores_TO.shape[1]:
        raise MoextendError(
            f"{name}/{quantity} names expert {theirs_Tk.max()}, but the router has {scores_TO.shape[1]} outputs here: "
            "the checkpoint is not the one that the reference was made with"
        )
    picked = [np.take_along_axis(scores_TO, ids_Tk, axis=-1)[where_T] for ids_Tk in (ours_Tk, theirs_Tk)]
    row = close(name, quantity, picked[0], picked[1], atol=atol)
    same_T = (ours_Tk == theirs_Tk).all(axis=-1)[where_T & ~tied_T]
    agreement = float(same_T.mean()) if same_T.size else None
    row = row._replace(agreement=agreement, note=_tied_note(tied_T & where_T, where_T))
    return row if agreement in (None, 1.0) else row._replace(verdict="differs")


def _tied_note(tied_T: np.ndarray, where_T: np.ndarray) -> str:
    return f"{tied_T.sum()} of {where_T.sum()} tokens tied: picks not compared" if tied_T.any() else ""


def _no_value(quantity: str, array: np.ndarray, config: ModelConfig, *, everywhere: bool, ce_defined: bool) -> str:
    if quantity in ("loss_ce", "loss_total") and not ce_defined:
        return "a label follows left padding, whose logits no mask defines"
    if quantity == "loss_aux_nomask":
        if not everywhere:
            return "counts left padding, whose routing no mask defines"
        if config.extensions and not array.any():
            return "the released code returns 0 for an extended model without a mask"
    return ""


def _why_absent(name: str, quantity: str, config: ModelConfig) -> str:
    if not quantity.partition("/")[2]:  # of images: everything else is there in any model
        return "the checkpoint has no vision tower"
    if config.adapters or config.blocks:
        return "layers are not looked into where low-rank updates or blocks stand beside them"
    extended = sorted({layer for of in config.extensions.values() for layer in of.layers})
    raise MoextendError(
        f"the reference holds {name}/{quantity}, but this model has {config.decoder.layers} layers, extended "
        f"ones {extended}: the checkpoint is not the one that the reference was made with"
    )


def _add_what_is_given(ours: dict[str, Any], rows: Rows, places: list[tuple[int, int, int]], *, room: int) -> None:
    """Features of the images that there are, in the order of their tags; and the inputs, as files repeat them."""
    seen: dict[int, int] = {}
    slots = []
    for row, _, _ in places:
        slots.append(row * room + seen.get(row, 0))
        seen[row] = seen.get(row, 0) + 1
    for name in ("clip_patch_features", "image_features"):
        if name in ours:
            ours[name] = ours[name][slots]
    ours["img_pos"] = np.asarray(places, np.int32).reshape(-1, 3)
    if rows.pixels_nhwc is not None:
        ours["pixel_values"] = rows.pixels_nhwc[list(rows.images)].transpose(0, 3, 1, 2)
