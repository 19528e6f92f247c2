"""`moextend compare`: computes here what a reference file holds, and prints what differs.

In: a checkpoint and one npz file of another implementation. Out: one table, or one JSON object; exit code 0 if all
that was compared is within tolerance, 1 if not. What the file holds and nobody compared is listed with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.table import Table

from moextend_jax.checkpoints import leaves, store
from moextend_jax.checkpoints.huggingface import read_json
from moextend_jax.checkpoints.loading import Checkpoint, open_checkpoint, open_source
from moextend_jax.compare.forward import compare_forward
from moextend_jax.compare.others import compare_generation, compare_selection, compare_tower
from moextend_jax.compare.reference import BATCH_OF_NONE, Reference, read_reference, start_tag
from moextend_jax.compare.training import Setup, compare_stage, equal_columns
from moextend_jax.compare.verdict import Row, Tolerances, summarised
from moextend_jax.config import Amount, MoextendError
from moextend_jax.models.moextend import abstract
from moextend_jax.settings import NotNegative, Positive
from moextend_jax.terminal import Parser, console, option

SIDE = {"before": "vision", "after": "vision_gate", "vision": "clip"}
"""Folders beside the reference that are taken where no option names others."""


class Comparison(NamedTuple):
    """rows: one per array of the file. notes: what the reader must know of how it was made."""

    rows: list[Row]
    notes: list[str]


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 or 1; mistakes are raised."""
    options = _parse(arguments)
    started = time.perf_counter()
    reference = read_reference(Path(options.reference))
    # Accelerators multiply float32 matrices in fewer bits unless told not to.
    with jax.default_matmul_precision("highest"):
        rows, notes = compare(reference, options)
    compared = [row for row in rows if row.verdict in ("ok", "differs")]
    ok = all(row.verdict == "ok" for row in compared)
    if not compared:
        raise MoextendError(f"nothing in {reference.path} could be compared: {rows[0].quantity}: {rows[0].note}")
    seconds = time.perf_counter() - started
    if options.json:
        record = {
            "reference": str(reference.path),
            "checkpoint": options.checkpoint,
            "kind": reference.kind,
            "ok": ok,
            "compared": len(compared),
            "differing": len([row for row in compared if row.verdict == "differs"]),
            "not_compared": len(rows) - len(compared),
            "seconds": round(seconds, 3),
            "notes": notes,
            "rows": [row.as_json() for row in rows],
        }
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        _print(reference, rows if options.all else summarised(rows), notes, seconds=seconds)
    return 0 if ok else 1


def compare(reference: Reference, options: argparse.Namespace) -> Comparison:
    simple = options.atol if options.atol is not None else Tolerances().simple
    composed = options.atol if options.atol is not None else Tolerances().composed
    tolerances = Tolerances(simple, composed, options.tie)
    if reference.kind == "clip":
        return Comparison(_tower(reference, options, tolerances), [])
    if reference.kind == "selection":
        return _selection(reference, options, tolerances)
    opened = _open(_checkpoint(options), options, reference)
    model, arrays = abstract(opened.config), opened.arrays
    start = _start(reference, options, Path(options.checkpoint))
    notes = [
        f"layer {layer}: router columns {a} and {b} are equal, so rounding decides between these experts"
        for layer, a, b in equal_columns(arrays, opened.config)
    ]
    if reference.kind == "generate":
        rows = compare_generation(reference, model, arrays, start=start, tolerances=tolerances)
        return Comparison(rows, notes)
    coefficient = _coefficient(reference, options)
    if reference.kind == "stage":
        setup = Setup(start, coefficient, options.learning_rate)
        stage = options.stage or _named_stage(reference.path)
        rows = compare_stage(reference, model, arrays, stage=stage, setup=setup, tolerances=tolerances)
        return Comparison(rows, notes)
    if options.stage:
        notes.append(f"--stage {options.stage} has no effect: the file is of a forward pass")
    rows = compare_forward(
        reference,
        model,
        arrays,
        start=start,
        aux_coefficient=coefficient,
        tolerances=tolerances,
        batch=options.batch,
    )
    return Comparison(rows, notes)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="moextend compare", description="compares with a reference")
    parser.add_argument("--checkpoint", help="folder of the model (of selection: the one before the probe)")
    parser.add_argument("--reference", required=True, help="npz file, beside its batches.npz and images.npz")
    parser.add_argument("--stage", help="stage of training; else by the file's name and parameters")
    parser.add_argument("--after", help="selection: folder of the model after the probe")
    parser.add_argument("--vision", help="folder of the vision tower; else `clip` beside the reference")
    parser.add_argument("--base", help="folder of the base, for a checkpoint that holds an extension alone")
    parser.add_argument("--batch", default=BATCH_OF_NONE, help="batch of arrays that name none (%(default)s)")
    parser.add_argument(
        "--image_start", type=option(Amount), help="id of the image start tag; else as manifest.json says"
    )
    parser.add_argument("--feature_layer", type=int, help="hidden state of the tower that the projector reads")
    parser.add_argument(
        "--aux_coefficient", type=option(NotNegative), help="of the load-balancing loss; else as manifest.json says"
    )
    parser.add_argument("--learning_rate", type=option(Positive), default=1e-3, help="of a stage's steps (%(default)s)")
    parser.add_argument(
        "--atol", type=option(NotNegative), help="tolerance instead of 1e-5 (simple) and 1e-4 (composed)"
    )
    parser.add_argument(
        "--tie", type=option(NotNegative), default=Tolerances().tie, help="logits this close tie (%(default)s)"
    )
    parser.add_argument("--all", action="store_true", help="a line per array instead of one per kind of array")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    options = parser.parse_args(list(arguments))
    return options


def _checkpoint(options: argparse.Namespace) -> Path:
    if not options.checkpoint:
        raise MoextendError("compare needs --checkpoint DIR")
    return Path(options.checkpoint)


def _open(folder: Path, options: argparse.Namespace, reference: Reference) -> Checkpoint:
    return open_checkpoint(
        folder,
        base=Path(options.base) if options.base else None,
        vision=_vision(folder, options, reference),
        feature_layer=options.feature_layer,
        dtype="float32",
        remat="none",
    )


def _vision(folder: Path, options: argparse.Namespace, reference: Reference) -> Path | None:
    """The folder given, or the one beside the reference, for a checkpoint that does not bring its tower's sizes."""
    if options.vision:
        return Path(options.vision)
    beside, inside = reference.folder / SIDE["vision"], folder / "vision"
    complete = store.is_imported(folder) or (inside / "config.json").is_file()
    complete = complete or str(_attributes(folder).get("model_type")).startswith("clip")
    return beside if beside.is_dir() and not complete else None


def _selection(reference: Reference, options: argparse.Namespace, tolerances: Tolerances) -> Comparison:
    before = Path(options.checkpoint) if options.checkpoint else reference.folder / SIDE["before"]
    after = Path(options.after) if options.after else reference.folder / SIDE["after"]
    if not options.after and before.resolve() == after.resolve():  # the probed model was named: it is the other one
        before = reference.folder / SIDE["before"]
    opened = [_open(folder, options, reference) for folder in (before, after)]
    if opened[0].config != opened[1].config:
        raise MoextendError(f"{before} and {after} are not models of the same sizes")
    rows = compare_selection(
        reference,
        abstract(opened[0].config),
        opened[0].arrays,
        opened[1].arrays,
        start=_start(reference, options, before),
        tolerances=tolerances,
    )
    return Comparison(rows, [f"before the probe: {before}; after: {after}"])


def _tower(reference: Reference, options: argparse.Namespace, tolerances: Tolerances) -> list[Row]:
    """Of the checkpoint only its tower is read; `--checkpoint` may be the tower's own folder."""
    folder = _checkpoint(options)
    vision = _vision(folder, options, reference)
    source = open_source(folder, vision=vision, feature_layer=options.feature_layer)
    config = dataclasses.replace(source.config, dtype="float32")
    own = {path: leaf for path, leaf in source.leaves.items() if path.startswith("vision/")}
    tower = abstract(config).vision
    if tower is None or not own:
        raise MoextendError(f"{folder} has no vision tower: name its folder, or give one with --vision DIR")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    arrays = leaves.read_sharded(own, dict.fromkeys(own, device), dtype="float32")
    arrays = {path.removeprefix("vision/"): array for path, array in arrays.items()}
    return compare_tower(reference, tower, arrays, tolerances=tolerances)


def _start(reference: Reference, options: argparse.Namespace, folder: Path) -> int | None:
    return start_tag(reference, given=options.image_start, attributes=_attributes(folder))


def _attributes(folder: Path) -> dict[str, Any]:
    """config.json as it is, for what only the released code keeps there."""
    at = folder / "config.json"
    return read_json(at) if at.is_file() else {}


def _coefficient(reference: Reference, options: argparse.Namespace) -> float:
    attributes = _attributes(Path(options.checkpoint))
    for value in (options.aux_coefficient, reference.spec.get("coef"), attributes.get("router_aux_loss_coef")):
        if isinstance(value, int | float):
            return float(value)
    raise MoextendError("neither manifest.json nor config.json says the loss coefficient: give --aux_coefficient")


def _named_stage(path: Path) -> str | None:
    """`stage_align_vision.npz` is of align; other names leave it to the parameters in the file."""
    parts = path.stem.split("_")
    return parts[1] if parts[0] == "stage" and len(parts) > 1 else None


def _print(reference: Reference, rows: list[Row], notes: list[str], *, seconds: float) -> None:
    table = Table(title=f"{reference.path}", caption="relative: to the largest value of the reference array")
    batches = any(row.batch for row in rows)
    agreements = any(row.agreement is not None for row in rows)
    names = ["quantity", "max abs", "max rel", *(["top-k equal"] if agreements else []), "tolerance", "verdict", "note"]
    for name in [*(["batch"] if batches else []), *names]:
        table.add_column(name, justify="left" if name in ("batch", "quantity", "verdict", "note") else "right")
    colour = {"ok": "green", "differs": "bold red"}
    for row in rows:
        cells = [row.quantity, _small(row.max_abs), _small(row.max_rel)]
        cells += ([_share(row.agreement)] if agreements else []) + [_small(row.tolerance)]
        verdict = f"[{colour.get(row.verdict, 'yellow')}]{row.verdict}[/]"
        table.add_row(*([row.batch] if batches else []), *cells, verdict, row.note)
    screen = console()
    screen.print(table)
    for note in notes:
        screen.print(note, highlight=False)
    screen.print(f"{seconds:.1f} s", highlight=False)


def _small(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4g} %"
