"""Checkpoints of a stage (Orbax): trainable leaves, optimizer state, step, place in the data, facts of the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from moextend_jax.config import MoextendError

logging.getLogger("absl").setLevel(logging.ERROR)


def open_manager(folder: Path, *, every: int, kept: int) -> ocp.CheckpointManager:
    """Asynchronous, atomic, keeps the newest `kept`."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=every, max_to_keep=kept, create=True)
    return ocp.CheckpointManager(folder.resolve(), options=options)


def save(
    manager: ocp.CheckpointManager, state: Any, rows: grain.DatasetIterator, *, facts: dict[str, Any], force: bool
) -> None:
    """Saves the named tuple `state` where the interval or `force` says so; `facts` (JSON) say what it belongs to."""
    step = int(state.step)
    if step in manager.all_steps():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        rows=grain.checkpoint.CheckpointSave(rows),  # pyright: ignore[reportCallIssue]
        facts=ocp.args.JsonSave(facts),
    )
    manager.save(step, args=args, force=force)


def restore(
    manager: ocp.CheckpointManager, state: Any, rows: grain.DatasetIterator, *, facts: dict[str, Any], where: Path
) -> Any:
    """The newest checkpoint into the structure (and shardings) of `state`; `rows` goes to its place in the data.

    Raises:
      MoextendError: the checkpoint belongs to another model or run; names the facts that differ.
    """
    step = manager.latest_step()
    assert step is not None
    saved = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
    check_facts(saved, facts, where=where)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state._asdict())
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract),
        rows=grain.checkpoint.CheckpointRestore(rows),  # pyright: ignore[reportCallIssue]
    )
    return type(state)(**manager.restore(step, args=args)["state"])


def check_facts(saved: dict[str, Any], facts: dict[str, Any], *, where: Path) -> None:
    differing = [name for name in sorted(facts) if saved.get(name) != facts[name]]
    if differing:
        said = "; ".join(f"{name}: {saved.get(name)!r} there, {facts[name]!r} now" for name in differing)
        raise MoextendError(f"{where} belongs to another run ({said}). Use another --workdir, or the old settings")


def save_leaves(folder: Path, leaves: dict[str, jax.Array], *, facts: dict[str, Any]) -> None:
    """Parameters alone by path, as a stage's result; replaces an older one."""
    with ocp.CheckpointManager(folder.resolve(), options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        step = (manager.latest_step() or 0) + 1
        manager.save(
            step, args=ocp.args.Composite(leaves=ocp.args.StandardSave(leaves), facts=ocp.args.JsonSave(facts))
        )
        manager.wait_until_finished()


def load_leaves(folder: Path, *, facts: dict[str, Any]) -> dict[str, jax.Array] | None:
    """What `save_leaves` wrote, or None where nothing is there; `facts` that differ are an error."""
    if not folder.exists():
        return None
    handlers = {"leaves": ocp.StandardCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder.resolve(), item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        saved = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
        check_facts(saved, facts, where=folder)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        item = manager.item_metadata(step)["leaves"]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), dict(item))
        return manager.restore(step, args=ocp.args.Composite(leaves=ocp.args.StandardRestore(abstract)))["leaves"]
