"""Checkpoints of a stage (Orbax): trainable leaves, optimizer state, step, place in the data, facts of the run."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from moextend_jax import distributed, faults
from moextend_jax.checkpoints import sums
from moextend_jax.config import MoextendError
from moextend_jax.folders import absolute, is_url
from moextend_jax.parameters import current_path

# What Orbax logs as an error, a traceback for each of its threads, it also raises: `disk_errors` says it in one line.
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EFBIG, errno.EIO,
    errno.ESTALE,
)  # fmt: skip
"""What a file system says when it refuses; TensorStore hides it in a page of its own settings."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: it would ask JAX with numbers of its own (`preemption.given`)."""
        return False


@contextlib.contextmanager
def open_manager(folder: Path, *, keep: int) -> Iterator[ocp.CheckpointManager]:
    """A manager of the checkpoints in `folder`, of which the newest `keep` stay. It saves in threads, atomically and
    with checksums; at the end it waits for what is being saved."""
    root = absolute(folder)
    if not is_url(root):  # where Orbax would make it in process 0 alone (`distributed.check_shared`)
        root.mkdir(parents=True, exist_ok=True)

    def add_sums() -> None:  # Orbax calls this when all files are there and the checkpoint is not yet committed
        for checkpoint in root.iterdir():
            if checkpoint.is_dir() and not (checkpoint / sums.NAME).exists():
                sums.write_sums(checkpoint)

    wait, handled = ocp.multihost.get_barrier_sync_fn(), sys.exc_info()[1]

    def together(*, key: str, timeout_ms: int) -> None:
        # Orbax comes here also where this process has failed to save. The others then wait elsewhere, for this process:
        # all of them for an hour.
        if (failed := sys.exc_info()[1]) is not None and failed is not handled:
            raise failed
        wait(key=key, timeout_ms=timeout_ms)

    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep,
        create=True,
        cleanup_tmp_directories=True,  # of a run that was killed while it saved
        # Other processes wait so long for the checksums: those of a whole Mixtral take minutes on a slow disk.
        async_options=ocp.options.AsyncOptions(
            timeout_secs=3600, barrier_sync_fn=together, post_finalization_callback=add_sums
        ),
    )
    manager = _Manager(root, options=options)
    with _quiet_threads():
        try:
            yield manager
        except BaseException:
            with contextlib.suppress(Exception):  # what is under way already is the better message
                manager.close()
            raise
        with disk_errors(manager):
            manager.close()


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Threads that fail print nothing: Orbax raises their errors again where the caller waits for them."""
    threads, unraisable = threading.excepthook, sys.unraisablehook
    threading.excepthook = lambda _: None
    # Interrupts go on: `preemption.not_lost` raises them again.
    sys.unraisablehook = lambda lost: None if issubclass(lost.exc_type, Exception) else unraisable(lost)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = threads, unraisable


def save(
    manager: ocp.CheckpointManager,
    state: Any,
    rows: grain.DatasetIterator,
    *,
    step: int,
    facts: dict[str, Any],
    counts_G: Any = (),
) -> None:
    """Starts to save the named tuple `state` of a step; does nothing where that step is saved already.

    Args:
      rows: its place in the data is saved.
      facts: JSON that says which model and run it belongs to; `start` compares it.
      counts_G: conversations read and skipped so far, by kind (`faults.py`).
    """
    if step == manager.latest_step():
        return
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state._asdict()),
        rows=ocp.args.JsonSave({"place": rows.get_state(), "faults": np.asarray(counts_G).tolist()}),
        facts=ocp.args.JsonSave(facts),
    )
    with disk_errors(manager):
        manager.save(step, args=args, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Returns when everything is on disk."""
    with disk_errors(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def disk_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Whatever a save raises, in whichever thread, as a mistake that the user can mend."""
    try:
        yield
    except Exception as error:  # OSError of Python, ValueError and RuntimeError of TensorStore
        message = " ".join(str(error).split())
        reason = next((os.strerror(code) for code in DISK if os.strerror(code) in message), message[:300])
        raise MoextendError(
            f"cannot save a checkpoint in {manager.directory}: {reason}. Those that were finished are intact: mend "
            f"the disk, and the same command goes on"
        ) from error


def start(
    manager: ocp.CheckpointManager,
    like: Any,
    rows: grain.DatasetIterator,
    *,
    facts: dict[str, Any],
    resume_from: Path | None,
    where: Path,
) -> tuple[Any, np.ndarray] | None:
    """The state to go on from and what of the data was skipped before it (`faults.py`): of the newest whole checkpoint,
    else the one at `resume_from`, else None. `rows` goes to its place in the data, which is the same for any mesh and
    number of processes.

    Args:
      like: the state as shapes with shardings.

    Raises:
      MoextendError: the checkpoint belongs to another model or run; names the facts that differ.
    """
    good = _newest_kept(manager)
    if good is not None:
        return _restore(manager, good, like, rows, facts=facts, where=where)
    if resume_from is None:
        return None
    root, step = _checkpoint_at(absolute(resume_from))
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(read_only=True)) as other:
        if step is None:
            step, _ = _newest_good(other)
        else:
            _check_whole(root / str(step), advice="Name another one")
        if step is None:
            raise MoextendError(f"resume_from {resume_from} holds no checkpoint")
        if distributed.first():
            print(f"{where}: starting from step {step} in {root}")
        return _restore(other, step, like, rows, facts=facts, where=root)


def facts_at(path: Path) -> dict[str, Any]:
    """What the checkpoints at a path that `start` takes as `resume_from` belong to."""
    root, step = _checkpoint_at(absolute(path))
    with ocp.CheckpointManager(root, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        for number in sorted(manager.all_steps(), reverse=True) if step is None else [step]:
            with contextlib.suppress(Exception):  # damaged; `start` says so, and takes an older one
                return _facts(manager, number)
    raise MoextendError(f"resume_from {path}: no checkpoint there can be read")


def _facts(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]


def _checkpoint_at(path: Path) -> tuple[Path, int | None]:
    """A folder of checkpoints, and which of them if the path is one."""
    if path.name.isdigit() and (path / sums.NAME).exists():
        return path.parent, int(path.name)
    for folder in (path / "checkpoints", path):
        if has_step(folder):
            return folder, None
    raise MoextendError(f"resume_from {path} holds no checkpoints: name WORKDIR/STAGE/checkpoints, or one step in it")


def _newest_good(manager: ocp.CheckpointManager) -> tuple[int | None, list[int]]:
    """The newest step whose files are what was written (None without checkpoints), and the newer ones, all broken.
    Process 0 checks them and prints a warning for each broken one.

    Raises:
      MoextendError: there are checkpoints, and all of them are broken, or a file cannot be read now.
    """
    steps = sorted(manager.all_steps(), reverse=True)

    def count() -> int:
        for number, step in enumerate(steps):
            checkpoint = cast(Path, manager.directory / str(step))  # perhaps in a bucket, which a Path cannot name
            if (wrong := sums.fault(checkpoint)) is None:
                return number
            print(f"moextend: checkpoint {checkpoint} is skipped: {wrong}", file=sys.stderr)
        return len(steps)

    broken = distributed.from_first(count)
    if steps and broken == len(steps):
        raise MoextendError(
            f"no checkpoint in {manager.directory} is whole. Bring one back from a copy, or delete the folder to begin "
            f"again"
        )
    return (steps[broken] if steps else None), steps[:broken]


def _newest_kept(manager: ocp.CheckpointManager) -> int | None:
    """The newest step that is whole. Newer, broken ones are deleted: the run makes them again."""
    good, broken = _newest_good(manager)
    for step in broken:
        manager.delete(step)
    return good


def _check_whole(folder: Path, *, advice: str) -> None:
    if wrong := distributed.from_first(lambda: sums.fault(folder)):
        raise MoextendError(f"{folder} is broken: {wrong}. {advice}")


def roll_back(manager: ocp.CheckpointManager, state: Any) -> Any:
    """The state of the newest checkpoint, in place of `state`, whose arrays are freed; None where there is none. The
    place in the data is not rolled back."""
    finish(manager)
    step = _newest_kept(manager)
    if step is None:
        return None
    like = type(state)(*jax.tree.map(ocp.utils.to_shape_dtype_struct, tuple(state)))
    free(state)
    return _state(manager, step, like)


def free(arrays: Any) -> None:
    """Gives the memory of these arrays back, whoever still holds them."""
    for array in jax.tree.leaves(arrays):
        array.delete()


def _restore(
    manager: ocp.CheckpointManager, step: int, like: Any, rows, *, facts, where: Path
) -> tuple[Any, np.ndarray]:
    args = ocp.args.Composite(facts=ocp.args.JsonRestore(), rows=ocp.args.JsonRestore())
    restored_items = manager.restore(step, args=args)
    check_facts(restored_items["facts"], facts, where=where)
    restored = _state(manager, step, like)
    rows.set_state(restored_items["rows"]["place"])
    return restored, faults.restored(restored_items["rows"]["faults"])


def _state(manager: ocp.CheckpointManager, step: int, like: Any) -> Any:
    """The state saved at `step`, on whatever mesh, in the structure and the shardings of `like`."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like._asdict()))
    return type(like)(**manager.restore(step, args=args)["state"])


BEFORE: dict[str, Any] = {
    "weight_guard": "none", "tags": [5, 6, 3], "mass": "base", "start": "copy", "wide": 1, "first_moment": "float32",
    "calibrator": "two_layers", "tokens": "all", "composition": "shared", "guidance": 0.0, "drift": 0.0,
    "column": "copy", "extension.expert": "copy", "extension.selection_bias": "copy", "opens_by": 0.0,
    "expert_storage": "as_is", "method": {},
    "settings.new_experts": 1, "settings.layers": "extender", "settings.source": "recipe", "settings.expert": 0,
}  # fmt: skip
"""Values of facts that an older record lacks: there was no choice then."""
NOT_SAID = ("medium", "rows")
"""Facts that an older record lacks and that nothing else tells: they are not compared there."""
WHOLE = ("multipliers", "weight_decays", "missing", "items_per_row", "parents")
"""Mappings whose keys a user chooses: a key that is gone counts as a difference, too."""
MAY_CHANGE = ("pictures",)
"""Facts that may differ, since damaged pictures are mended in the middle of a stage, but not unnoticed."""


def check_facts(saved: Mapping[str, Any], facts: Mapping[str, Any], *, where: Path) -> None:
    """Raises MoextendError where `saved` lacks or contradicts any of `facts`; names what differs."""
    for name in MAY_CHANGE:
        if name in saved and name in facts and saved[name] != facts[name] and distributed.first():
            message = f"{where}: goes on with other {name} than it began with: names, sizes or times differ"
            print(f"moextend: {message}", file=sys.stderr)
    if wrong := differing(saved, facts):
        raise MoextendError(
            f"{where} belongs to another run ({'; '.join(wrong)}). Use another --workdir, or the old settings"
        )


def differing(saved: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """What `saved` lacks or contradicts of `facts`, in words."""
    free = {*MAY_CHANGE, *(name for name in NOT_SAID if name not in saved)}
    return list(_differing(saved, {name: fact for name, fact in facts.items() if name not in free}))


def _differing(saved: Any, facts: Mapping[str, Any], prefix: str = "", *, whole: bool = False) -> Iterator[str]:
    saved = saved if isinstance(saved, Mapping) else {}
    for name in sorted({*facts, *(saved if whole else ())}):
        before, now = saved.get(name, BEFORE.get(f"{prefix}{name}", BEFORE.get(name))), facts.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            yield from _differing(before, now, f"{prefix}{name}.", whole=name in WHOLE)
        elif before != now:
            yield f"{prefix}{name}: {before!r} there, {now!r} now"


def save_leaves(folder: Path, leaves: dict[str, jax.Array], *, facts: dict[str, Any]) -> None:
    """Parameters alone by path, as a stage's result; replaces an older one."""
    with open_manager(folder, keep=1) as manager:
        args = ocp.args.Composite(leaves=ocp.args.StandardSave(leaves), facts=ocp.args.JsonSave(facts))
        with disk_errors(manager):
            manager.save((manager.latest_step() or 0) + 1, args=args)
            manager.wait_until_finished()


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints, or the result, that have been saved in a folder; none where saving was cut off. On a
    disk Orbax renames what is whole; in a bucket, which cannot, it adds a file."""
    steps = [child for child in folder.iterdir() if child.name.isdigit()] if folder.exists() else []
    return [int(step.name) for step in steps if not is_url(folder) or ocp.utils.is_checkpoint_finalized(step)]


def has_step(folder: Path) -> bool:
    """Whether a checkpoint, or a result, has been saved there."""
    return bool(steps_in(folder))


def result_facts(folder: Path) -> dict[str, Any] | None:
    """What `save_leaves` was told that a result belongs to, with the `identity` of its files; None: no result."""
    handlers = {"facts": ocp.JsonCheckpointHandler()}
    if not folder.exists():
        return None
    with ocp.CheckpointManager(absolute(folder), item_handlers=handlers) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        return {**_facts(manager, step), "identity": sums.identity(absolute(folder) / str(step))}


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
        _check_whole(absolute(folder) / str(step), advice="Delete it and run its stage again")
        check_facts(_facts(manager, step), facts, where=folder)
        yield Result(manager, step, dict(manager.item_metadata(step)["leaves"]))


def load_leaves(
    folder: Path, *, facts: Mapping[str, Any], shardings: Mapping[str, jax.sharding.Sharding] | None = None
) -> dict[str, jax.Array] | None:
    """The leaves of `open_result` as arrays by path; None where there is no result. Without `shardings` (by path) each
    leaf goes whole to the first device."""
    with open_result(folder, facts=facts) as result:
        if result is None:
            return None
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = {
            path: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=shardings[current_path(path)] if shardings else device
            )
            for path, leaf in result.leaves.items()
        }
        args = ocp.args.Composite(leaves=ocp.args.StandardRestore(abstract))
        restored = result.manager.restore(result.step, args=args)["leaves"]
        return {current_path(path): leaf for path, leaf in restored.items()}
