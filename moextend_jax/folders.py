"""Folders that may be URLs: the text of an option in, a path to read and write out.

A gs:// path is an `etils.epath` path, which has pathlib's methods; it needs the extra `gcs`.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, cast

from etils import epath

from moextend_jax.config import MoextendError


def folder(text: str) -> Path:
    """The folder that a user named."""
    if "://" not in text:
        return Path(text)
    if not text.startswith("gs://"):
        raise MoextendError(
            f"{text}: of URLs only gs:// ones are read; copy it to a folder, or a bucket, and name that"
        )
    if importlib.util.find_spec("gcsfs") is None:
        raise MoextendError(f"{text}: a gs:// path needs gcsfs; pip install 'moextend-jax[gcs]'")
    return cast(Path, epath.Path(text))


def is_url(path: Any) -> bool:
    return "://" in os.fspath(path)


def absolute(path: Path) -> Path:
    return path if is_url(path) else path.resolve()


def local(path: Path, *, what: str) -> Path:
    """The path itself; an error where something that must be mapped into memory would be in a bucket."""
    if is_url(path):
        raise MoextendError(f"{what} cannot be in {os.fspath(path)}: give a folder of a file system")
    return path
