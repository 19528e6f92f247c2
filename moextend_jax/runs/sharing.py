"""Work directories that begin alike: results of one are linked into another, not made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moextend_jax import distributed
from moextend_jax.checkpoints import train_state
from moextend_jax.folders import is_url
from moextend_jax.runs.results import FIRST


def finished(made: Path, name: str) -> bool:
    """Whether a work directory has the whole of a result: what is written last."""
    folder, how = made / name, FIRST.results[name].how
    last = {"train": "stage.json", "select": "routing.json"}
    return (folder / last[how]).exists() if how in last else train_state.has_step(folder / "result")


def share(made: Path, folder: Path, names: Iterable[str]) -> None:
    """Links these results of the work directory `made`, those that are finished, into `folder`, which keeps its own;
    cached features lie in one folder for both."""
    if not distributed.first() or is_url(folder):
        return
    for name in names:
        if not finished(made, name) or (folder / name).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if not (own := folder / "features").exists():
            (features := (made / "features").resolve()).mkdir(exist_ok=True)
            own.symlink_to(os.path.relpath(features, folder.resolve()), target_is_directory=True)
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(made / name, unfinished, copy_function=_link)
        unfinished.rename(folder / name)


def _link(source: str, to: str) -> str:
    try:
        os.link(source, to)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, to)
    return to
