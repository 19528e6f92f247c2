"""Where reference numbers of other methods lie.

    MOEXTEND_METHODS=FOLDER pytest tests/parity

In: a file's name, such as "compose.npz". Out: its path in the folder of MOEXTEND_METHODS, in the layout of
../shared/methods_oracle; else in that folder. What is not there is skipped. Sizes are read from the arrays.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

NAMED = os.environ.get("MOEXTEND_METHODS", "")
FOLDER = Path(NAMED) if NAMED else Path(__file__).parents[3] / "shared" / "methods_oracle"


def methods_file(name: str) -> Path:
    if NAMED and not FOLDER.is_dir():
        pytest.fail(f"MOEXTEND_METHODS: {FOLDER} is no folder of reference numbers")
    if not (FOLDER / name).is_file():
        pytest.skip(f"no reference values: {FOLDER} holds no {name}")
    return FOLDER / name


def methods_arrays(name: str) -> dict[str, np.ndarray]:
    """All of NAME.npz."""
    with np.load(methods_file(f"{name}.npz"), allow_pickle=False) as file:
        return dict(file)
