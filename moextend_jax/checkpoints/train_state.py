"""Checkpoints of a stage (Orbax): trainable leaves, optimizer state, step, place in the data, facts of the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import orbax.checkpoint as ocp

from moextend_jax.config import MoextendError
from moextend_jax.folders import absolute

logging.getLogger("absl").setLevel(logging.ERROR)


def open_manager(folder: Path, *, every: int, kept: int) -> ocp.CheckpointManager:
    """Asynchronous, atomic, keeps the newest `kept`."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=kept, create=True)
    return ocp.CheckpointManager(absolute(folder), options=options)


def save(
    manager: ocp.CheckpointManager,
    state: Any,
    rows: grain.DatasetIterator,
    *,
    facts: dict[str, Any],
    shares: Sequence[int] = (0,),
    force: bool,
) -> None:
    """Saves the named tuple `state` where the interval or `force` says so; `facts` (JSON) say what it belongs to.

    `shares` is which part of every batch's rows each process reads.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        rows=grain.checkpoint.CheckpointSave(rows),  # pyright: ignore[reportCallIssue]
        facts=ocp.args.JsonSave(facts | {"shares": list(shares)}),
    )
    manager.save(step, args=args, force=force)


def restore(
    manager: ocp.CheckpointManager,
    state: Any,
    rows: grain.DatasetIterator,
    *,
    facts: dict[str, Any],
    shares: Sequence[int] = (0,),
    where: Path,
) -> Any:
    """The newest checkpoint into the structure (and shardings) of `state`; `rows` goes to its place in the data.

    The mesh may be another one. Where processes now read other parts of the rows than those that saved, the batches
    so far are read again; with several conversations in a row, these are then not quite the same ones.

    Raises:
      MoextendError: the checkpoint belongs to another model or run; names the facts that differ.
    """
    step = manager.latest_step()
    assert step is not None
    saved = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
    check_facts(saved, facts, where=where)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    items: dict[str, Any] = {"state": ocp.args.StandardRestore(abstract)}
    if saved.get("shares", [0]) == list(shares):
        items["rows"] = grain.checkpoint.CheckpointRestore(rows)  # pyright: ignore[reportCallIssue]
    else:
        print(f"{where}: other processes saved this; reading {step} batches again to find the place in the data")
        for _ in range(step):
            next(rows)
    return type(state)(**manager.restore(step, args=ocp.args.Composite(**items))["state"])


def check_facts(saved: Mapping[str, Any], facts: Mapping[str, Any], *, where: Path) -> None:
    differing = [name for name in sorted(facts) if saved.get(name) != facts[name]]
    if differing:
        said = "; ".join(f"{name}: {saved.get(name)!r} there, {facts[name]!r} now" for name in differing)
        raise MoextendError(f"{where} belongs to another run ({said}). Use another --workdir, or the old settings")


def save_leaves(folder: Path, leaves: dict[str, jax.Array], *, facts: dict[str, Any]) -> None:
    """Parameters alone by path, as a stage's result; replaces an older one."""
    with ocp.CheckpointManager(absolute(folder), options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        step = (manager.latest_step() or 0) + 1
        manager.save(
            step, args=ocp.args.Composite(leaves=ocp.args.StandardSave(leaves), facts=ocp.args.JsonSave(facts))
        )
        manager.wait_until_finished()


class Result(NamedTuple):
    """What `save_leaves` wrote, opened. leaves: by path, what has a shape and a dtype; none has been read."""

    manager: ocp.CheckpointManager
    step: int
    leaves: dict[str, Any]


@contextlib.contextmanager
def open_result(folder: Path, *, facts: Mapping[str, Any]) -> Iterator[Result | None]:
    """The newest result in a folder, or None where nothing is there; `facts` that differ are an error."""
    if not folder.exists():
        yield None
        return
    handlers = {"leaves": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(absolute(folder), item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            yield None
            return
        saved = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
        check_facts(saved, facts, where=folder)
        yield Result(manager, step, dict(manager.item_metadata(step)["leaves"]))


def load_leaves(
    folder: Path, *, facts: Mapping[str, Any], shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, jax.Array] | None:
    """The leaves of `open_result` as arrays, sharded so by path; None: whole on the first device."""
    with open_result(folder, facts=facts) as result:
        if result is None:
            return None
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path] if shardings else device)
            for path, leaf in result.leaves.items()
        }
        args = ocp.args.Composite(leaves=ocp.args.StandardRestore(abstract))
        return result.manager.restore(result.step, args=args)["leaves"]
