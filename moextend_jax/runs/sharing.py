"""Work directories that begin alike: results of one are linked into another, not made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from moextend_jax import distributed
from moextend_jax.folders import is_url


def share(made: Path, folder: Path, names: Iterable[str]) -> None:
    """Links these results of the work directory `made`, those that are there, into `folder` if that is not there yet;
    cached features lie in one folder for both."""
    if not distributed.first() or folder.exists() or is_url(folder):
        return
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name in names:
        if (made / name).exists():
            shutil.copytree(made / name, unfinished / name, copy_function=_link)
    if unfinished.exists():
        features = (made / "features").resolve()
        features.mkdir(exist_ok=True)
        at = os.path.relpath(features, unfinished.resolve())
        (unfinished / "features").symlink_to(at, target_is_directory=True)
        unfinished.rename(folder)


def _link(source: str, to: str) -> str:
    try:
        os.link(source, to)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, to)
    return to
