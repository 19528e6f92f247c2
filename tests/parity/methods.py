"""Where reference numbers of other methods lie.

    MOEXTEND_METHODS=FOLDER pytest tests/parity       (several folders: with os.pathsep between them)

In: a file's name, such as "compose.npz". Out: its path in the first folder of MOEXTEND_METHODS that has it, in the
layout of ../shared/methods_oracle; else in that folder. What is not there is skipped. Sizes are read from the arrays.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parity.sets import arrays, folders_of

NAMED = folders_of("MOEXTEND_METHODS")
FOLDERS = [*map(Path, NAMED)] or [Path(__file__).parents[3] / "shared" / "methods_oracle"]


def there(folder: Path) -> Path:
    if NAMED and not folder.is_dir():
        pytest.fail(f"MOEXTEND_METHODS: {folder} is no folder of reference numbers")
    return folder


def methods_file(name: str) -> Path:
    for folder in map(there, FOLDERS):
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"no reference values: {' and '.join(map(str, FOLDERS))} holds no {name}")


def methods_arrays(name: str) -> dict[str, np.ndarray]:
    """All of NAME.npz."""
    return arrays(methods_file(f"{name}.npz").parent, name)
