"""`folder`: every folder of reference numbers that is checked, one after another.

    MOEXTEND_ORACLE=FOLDER pytest tests/parity       (several folders: with os.pathsep between them)

In: the folders of MOEXTEND_ORACLE, in the layout of ../shared/oracle; else that folder, where it is, and one of other
sizes that reference_set.py derives. What a folder lacks is skipped; what a test does not know in it fails.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import reference_set

from parity.sets import FOLDERS


@pytest.fixture(scope="session", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of reference numbers."""
    if request.param == "shared":
        path = request.getfixturevalue("shared") / "oracle"
    elif request.param.startswith("derived"):
        derived = reference_set.Set(tmp_path_factory.mktemp("derived"))
        return derived.write(stages=request.param == "derived stages")
    else:
        path = Path(request.param)
    if not path.is_dir():
        pytest.fail(f"{path} is no folder of reference numbers")
    return path.resolve()
