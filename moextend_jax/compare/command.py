"""`moextend compare`: computes here the forward pass that a reference file holds, and prints what differs.

In: a checkpoint and one npz file of another implementation. Out: one table, or one JSON object; exit code 0 if all
that was compared is within tolerance, 1 if not. What the file holds and nobody compared is listed with the reason.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import jax
from rich.table import Table

from moextend_jax.checkpoints import store
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.compare.forward import compare_forward, equal_columns, is_inside
from moextend_jax.compare.observe import observer
from moextend_jax.compare.reference import Reference, read_reference, start_tag
from moextend_jax.compare.verdict import Row, Tolerances, summarised
from moextend_jax.config import Amount, MoextendError, Range
from moextend_jax.mesh import one_device
from moextend_jax.models.moextend import abstract
from moextend_jax.models.router import WEIGHT_GUARDS
from moextend_jax.outside import shown
from moextend_jax.runs.askable import open_place
from moextend_jax.runs.place import Place
from moextend_jax.settings import NotNegative
from moextend_jax.terminal import as_json, console, quoted

TOWER = "clip"
"""Folder beside the reference that is taken where no option names the vision tower's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareOptions:
    checkpoint: Path
    """folder of the model"""
    reference: Path
    """npz file, beside its batches.npz"""
    vision: Path | None = None
    """folder of the vision tower; else `clip` beside the reference"""
    base: Path | None = None
    """folder of the base, for a checkpoint that holds an extension alone"""
    image_start: Amount | None = None
    """id of the image start tag; else as manifest.json says"""
    feature_layer: Annotated[int, Range(most=-1)] | None = None
    """hidden state of the tower that the projector reads"""
    aux_coefficient: NotNegative | None = None
    """of the load-balancing loss; else as manifest.json says"""
    atol: NotNegative | None = None
    """tolerance instead of 1e-5 (simple) and 1e-4 (composed)"""
    tie: NotNegative = Tolerances().tie
    """logits this close tie"""
    all: bool = False
    """a line per array instead of one per kind of array"""
    json: bool = False
    """one JSON object instead of the table"""


def compare_command(options: CompareOptions) -> int:
    """Computes here the forward pass that a reference file holds, and prints what differs; exit code 1 if anything."""
    started = time.perf_counter()
    reference = read_reference(options.reference)
    # Accelerators multiply float32 matrices in fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        rows, notes = compare(reference, options)
    compared = [row for row in rows if row.verdict != "not compared"]
    differing = [row for row in rows if row.verdict == "differs"]
    if not compared:
        raise MoextendError(f"nothing in {reference.path} could be compared: {rows[0].quantity}: {rows[0].note}")
    seconds = time.perf_counter() - started
    if options.json:
        record = {
            "reference": str(reference.path),
            "checkpoint": str(options.checkpoint),
            "ok": not differing,
            "compared": len(compared),
            "differing": len(differing),
            "not_compared": len(rows) - len(compared),
            "seconds": round(seconds, 3),
            "notes": notes,
            "rows": as_json(rows),  # a difference that is no number is null, and its verdict says that it differs
        }
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        _print(reference, rows if options.all else summarised(rows), notes, seconds=seconds)
    return 1 if differing else 0


def compare(reference: Reference, options: CompareOptions) -> tuple[list[Row], list[str]]:
    """A row per array of the file, and notes: what the reader must know of the model."""
    folder = options.checkpoint
    at = folder / "config.json"  # the released code alone keeps the coefficient and the start tag there
    attributes = read_json(at) if at.is_file() else {}
    place = Place(
        checkpoint=folder,
        base=options.base,
        vision=options.vision or _tower_beside(reference, folder),
        feature_layer=options.feature_layer,
        dtype="float32",
    )
    if place.in_workdir:
        raise MoextendError(f"{folder} is a work directory: `moextend export` makes a checkpoint of it to compare")
    opened = open_place(place, mesh=one_device())
    defaults = Tolerances()
    simple, composed = (default if options.atol is None else options.atol for default in defaults[:2])
    observe = observer(
        # What it is held against is mostly computed by the released code, which guards nothing.
        abstract(dataclasses.replace(opened.config, weight_guard=_weight_guard(reference))),
        aux_coefficient=_coefficient(reference, options, attributes),
        inside=is_inside(reference),
    )
    rows = compare_forward(
        reference,
        opened.config,
        opened.arrays,
        observe=observe,
        start=start_tag(reference, given=options.image_start, attributes=attributes),
        tolerances=Tolerances(simple, composed, options.tie),
    )
    notes = [
        f"layer {layer}: router columns {a} and {b} are equal, so rounding decides between these experts"
        for layer, a, b in equal_columns(opened.arrays, opened.config)
    ]
    return rows, notes


def _tower_beside(reference: Reference, folder: Path) -> Path | None:
    """The tower beside the reference, for a checkpoint that does not bring its tower's sizes."""
    beside = reference.folder / TOWER
    complete = store.is_imported(folder) or (folder / "vision" / "config.json").is_file()
    return beside if beside.is_dir() and not complete else None


def _coefficient(reference: Reference, options: CompareOptions, attributes: dict[str, Any]) -> float:
    for value in (options.aux_coefficient, reference.spec.get("coef"), attributes.get("router_aux_loss_coef")):
        if isinstance(value, int | float):
            return float(value)
    raise MoextendError("neither manifest.json nor config.json says the loss coefficient: give --aux_coefficient")


def _weight_guard(reference: Reference) -> Any:
    guard = reference.spec.get("weight_guard", "none")
    if not isinstance(guard, str) or guard not in WEIGHT_GUARDS:
        raise MoextendError(
            f"{reference.folder / 'manifest.json'}: weight_guard {shown(guard)} is unknown; known are "
            f"{', '.join(WEIGHT_GUARDS)}"
        )
    return guard


def _print(reference: Reference, rows: list[Row], notes: list[str], *, seconds: float) -> None:
    table = Table(title=f"{reference.path}", caption="relative: to the largest value of the reference array")
    batches = any(row.batch for row in rows)
    agreements = any(row.agreement is not None for row in rows)
    names = ["quantity", "max abs", "max rel", *(["top-k equal"] if agreements else []), "tolerance", "verdict", "note"]
    for name in [*(["batch"] if batches else []), *names]:
        table.add_column(name, justify="left" if name in ("batch", "quantity", "verdict", "note") else "right")
    colour = {"ok": "green", "differs": "bold red"}
    for row in rows:
        cells = [quoted(row.quantity), _small(row.max_abs), _small(row.max_rel)]
        cells += ([_share(row.agreement)] if agreements else []) + [_small(row.tolerance)]
        verdict = f"[{colour.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        table.add_row(*([quoted(row.batch)] if batches else []), *cells, verdict, quoted(row.note))
    screen = console()
    screen.print(table)
    for note in notes:
        screen.print(note, highlight=False, markup=False)
    screen.print(f"{seconds:.1f} s", highlight=False)


def _small(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4g} %"
