"""Compares a stage of training: the gradient of the first batch, losses and norms of each step, parameters after them.

In: a `Reference` of kind "stage" (`grad/NAME`, `paramN/NAME` after N steps, `steps` [n, 4] = loss, CE, aux, gradient
norm; batches train0, train1, ... beside it; AdamW with clipping) and a model. Out: one `Row` per array of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moextend_jax.checkpoints import huggingface, names
from moextend_jax.checkpoints.tensors import some
from moextend_jax.compare.forward import ties
from moextend_jax.compare.observe import RELEASED
from moextend_jax.compare.reference import Reference, Rows, check_fits, most_images, rows_of, to_batch
from moextend_jax.compare.verdict import Row, Tolerances, close, left_out
from moextend_jax.config import Batch, ModelConfig, MoextendError
from moextend_jax.models.moextend import MoExtend
from moextend_jax.models.parameters import with_arrays
from moextend_jax.train import stages
from moextend_jax.train.loss import losses
from moextend_jax.train.optimizer import OptimizerConfig, make_optimizer
from moextend_jax.train.step import init_state, make_step

FIRST = "train0"
STEP = ("loss", "ce", "aux", "grad_norm")
_CHUNK = 64


class Setup(NamedTuple):
    """How the reference trained."""

    start: int | None
    aux_coefficient: float
    learning_rate: float


def compare_stage(
    reference: Reference,
    model: MoExtend,
    arrays: dict[str, jax.Array],
    *,
    stage: str | None,
    setup: Setup,
    tolerances: Tolerances,
) -> list[Row]:
    """`stage` is a name of `stages.STAGES`; None takes it from the parameters that the file names."""
    trainable, frozen = stages.split(arrays, stages.STAGES[stage_of(reference, model.config, stage=stage)])
    parts = _parts(reference)
    steps = parts.pop("steps", {})
    after = [int(part.removeprefix("param")) for part in parts if re.fullmatch("param[0-9]{1,6}", part)]
    last = max([0, *after, *(len(np.atleast_1d(array)) for array in steps.values())])
    known = {key.split("/")[0] for key in reference.beside["batches"]}
    wanted = [name for n in range(last) if (name := f"train{n}") in known]
    batches = _batches(reference, dict.fromkeys([*wanted, FIRST] if "grad" in parts else wanted), setup, model)

    tied, note = 0, ""
    if FIRST in batches:
        tied = tied_tokens(model, arrays, batches[FIRST], noise=tolerances.tie)
        note = f"{tied} of {batches[FIRST].segments_BL.astype(bool).sum()} tokens of {FIRST} tie between equal columns"
    found: list[Row] = []
    if gradients := parts.pop("grad", {}):
        if tied:
            found += [Row("", f"grad/{name}", "tied: not compared", note=note) for name in gradients]
        else:
            gradient = _gradient(model, trainable, frozen, batches[FIRST], setup)
            found += _by_name("grad", gradient, gradients, model.config, atol=tolerances.simple)
    for name, array in steps.items():
        if name or array.ndim != 2 or array.shape[1] != len(STEP):
            raise MoextendError(f"steps must be [steps, {len(STEP)}] of {', '.join(STEP)}; it is {array.shape}")
    metrics: list[list[float]] = []
    for count, metric, trained in _run(model, trainable, frozen, batches, setup, steps=1 if tied else last):
        metrics.append(metric)
        if parameters := {} if tied else parts.pop(f"param{count}", {}):
            found += _by_name(f"param{count}", trained, parameters, model.config, atol=tolerances.composed)
    found += _steps(metrics, steps.get(""), tied=note if tied else "", tolerances=tolerances)
    for part, arrays_left in parts.items():
        why = f"batches.npz holds no {'train' + str(len(metrics))!r}" if part.startswith("param") else "unknown"
        row = Row("", "", "tied: not compared", note=note) if tied else left_out("", "", why)
        found += [row._replace(quantity=f"{part}/{name}" if name else part) for name in arrays_left]
    return found


def stage_of(reference: Reference, config: ModelConfig, *, stage: str | None) -> str:
    """The row of `stages.STAGES` whose leaves are exactly those that the file names, under the stage's own name
    or a recipe's variant of it."""
    named = {key.partition("/")[2] for key in reference.arrays if re.match(r"(grad|param\d+)/", key)}
    if stage is not None and stage not in stages.STAGES:
        raise MoextendError(f"stage {stage!r} is unknown; there are {', '.join(stages.STAGES)}")
    if not named:
        if stage is None:
            raise MoextendError(f"{reference.path} names no parameters: say which --stage it is of")
        return stage
    files = {tensor.file: tensor.path for tensor in names.tensors("released", config)}
    if unknown := sorted(named - files.keys()):
        raise MoextendError(f"{reference.path} names parameters that this model does not have: {some(unknown)}")
    candidates = [name for name in stages.STAGES if stage is None or name.startswith(stage)]
    trains = {}
    for name in candidates:
        paths, _ = _split_paths(set(files.values()), stages.STAGES[name])
        trains[name] = {file for file, path in files.items() if path in paths}
        if trains[name] == named:
            return name
    nearest = min(trains, key=lambda name: len(trains[name] ^ named))
    missing, surplus = sorted(trains[nearest] - named), sorted(named - trains[nearest])
    raise MoextendError(
        f"the parameters in {reference.path} are those of no stage ({', '.join(candidates)}); nearest is {nearest}."
        + (f" Missing: {some(missing)}." if missing else "")
        + (f" Not trained there: {some(surplus)}." if surplus else "")
    )


def tied_tokens(model: MoExtend, arrays: dict[str, jax.Array], batch: Batch, *, noise: float) -> int:
    """Real tokens that rounding sends to one or the other of two experts with equal router columns, at least one of
    which is cut off: their gradients belong to whichever was picked."""
    twins = equal_columns(arrays, model.config)
    if not twins:
        return 0
    routing = jax.jit(lambda arrays, batch: with_arrays(model, arrays)(batch).routing)(arrays, batch)
    real_T = np.asarray(batch.segments_BL).reshape(-1) > 0
    tied_T = np.zeros_like(real_T)
    for z in {z for z, _, _ in twins}:
        logits_TO = np.asarray(routing.logits_TO[z])
        tied_T |= ties(logits_TO, top_k=model.config.decoder.top_k, noise=noise).boundary_T
    return int((tied_T & real_T).sum())


def equal_columns(arrays: dict[str, jax.Array], config: ModelConfig) -> list[tuple[int, int, int]]:
    """(layer, expert, expert) of router columns that are bitwise equal, as a new column is when it is made."""
    gate_ZDE = np.asarray(arrays["decoder/layers/moe/gate"])
    new_YDX = np.asarray(arrays["extension/router/new_gate"]) if config.extension else None
    found = []
    for z, gate_DE in enumerate(gate_ZDE):
        columns = list(gate_DE.T)
        if new_YDX is not None and config.extension and z in config.extension.layers:
            columns += list(new_YDX[config.extension.layers.index(z)].T)
        first: dict[bytes, int] = {}
        for o, column in enumerate(columns):
            twin = first.setdefault(np.ascontiguousarray(column, np.float32).tobytes(), o)
            if twin != o:
                found.append((z, twin, o))
    return found


def _batches(reference: Reference, named: Iterable[str], setup: Setup, model: MoExtend) -> dict[str, Batch]:
    """All with the same room for images, so that one compiled program serves them."""
    vision = model.config.vision
    tag = setup.start if vision else None
    rows = {name: rows_of(reference, name, start=tag) for name in named}
    for name, own in rows.items():
        check_fits(own, model.config, name=name)
    room = most_images(rows.values(), start=tag)

    def batch(own: Rows) -> Batch:
        if own.pixels_nhwc is None and room and vision:
            own = own._replace(pixels_nhwc=np.zeros((1, vision.image_size, vision.image_size, 3), np.float32))
        return to_batch(own, start=tag, patches=vision.patches if vision else 0, room=room)

    return {name: batch(own) for name, own in rows.items()}


def _gradient(model: MoExtend, trainable, frozen, batch: Batch, setup: Setup) -> dict[str, jax.Array]:
    def total(trainable, frozen, batch):
        whole = with_arrays(model, {**trainable, **frozen})
        return losses(whole, batch, recipe=RELEASED, aux_coefficient=setup.aux_coefficient, chunk=_CHUNK)[0].total

    return jax.jit(jax.grad(total))(trainable, frozen, batch)


def _run(model: MoExtend, trainable, frozen, batches: dict[str, Batch], setup: Setup, *, steps: int):
    """(steps done, [loss, CE, aux, norm], parameters) after every step for which there is a batch."""

    def schedule(_):
        return jnp.float32(setup.learning_rate)

    config = OptimizerConfig(learning_rate=setup.learning_rate)
    optimizer = make_optimizer(config, paths=trainable)
    step = make_step(
        model,
        optimizer=optimizer,
        schedule=schedule,
        recipe=RELEASED,
        aux_coefficient=setup.aux_coefficient,
        loss_chunk=_CHUNK,
    )
    state = init_state({path: leaf.copy() for path, leaf in trainable.items()}, optimizer)
    for count in range(steps):
        if f"train{count}" not in batches:
            return
        state, metrics = step(state, frozen, batches[f"train{count}"])
        trained = {path: np.asarray(leaf) for path, leaf in state.trainable.items()}  # the next step takes the buffers
        yield count + 1, [float(metrics[name]) for name in STEP], trained


def _steps(metrics: list[list[float]], theirs: np.ndarray | None, *, tied: str, tolerances: Tolerances) -> list[Row]:
    if theirs is None:
        return []
    found = []
    for column, name in enumerate(STEP):
        for count in range(len(theirs)):
            quantity = f"steps/{count + 1}/{name}"
            if tied and (count > 0 or name == "grad_norm"):
                found.append(Row("", quantity, "tied: not compared", note=tied))
            elif count >= len(metrics):
                found.append(left_out("", quantity, f"batches.npz holds no 'train{count}'"))
            else:
                found.append(
                    close("", quantity, metrics[count][column], theirs[count, column], atol=tolerances.composed)
                )
    return found


def _by_name(part: str, ours, theirs: dict[str, np.ndarray], config: ModelConfig, *, atol: float) -> list[Row]:
    """Tensor by tensor, in the file's layout."""
    tensors = {tensor.file: tensor for tensor in names.tensors("released", config)}
    leaves = huggingface.from_arrays(ours, config=config)

    def value(file: str) -> np.ndarray:
        return leaves[tensors[file].path].theirs(tensors[file].index)

    return [close("", f"{part}/{file}", value(file), array, atol=atol) for file, array in theirs.items()]


def _parts(reference: Reference) -> dict[str, dict[str, np.ndarray]]:
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, array in reference.arrays.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = array
    return parts


def _split_paths(paths: set[str], patterns: tuple[str, ...]) -> tuple[set[str], set[str]]:
    try:
        trained, frozen = stages.split(dict.fromkeys(paths), patterns)
    except MoextendError:  # this model lacks what the stage trains
        return set(), paths
    return set(trained), set(frozen)
