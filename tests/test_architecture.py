"""Dependencies go in one direction: in that of the table in docs/architecture.md."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moextend_jax"
NOT_CODE_OF_OURS = ("assets", "configs")  # files that are copied elsewhere, and those of users


def order() -> dict[str, int]:
    """Of each part, a module or a package: the number of its line in the table."""
    lines = (ROOT / "docs" / "architecture.md").read_text().split("| part of ", 1)[1].split("\n\n", 1)[0].splitlines()
    return {part: n for n, line in enumerate(lines) for part in re.findall(r"`([\w.]+)/?`", line.split("|")[1])}


def imported(file: Path) -> Iterator[str]:
    """Names in full, from anywhere in a module, inside of functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def part_of(name: str) -> str:
    """The part that a module's or a function's full name lies in."""
    first = name.split(".")[1]
    return first if (PACKAGE / first).is_dir() else f"{first}.py"


def test_modules_import_from_their_own_line_of_the_table_and_those_above():
    number = order()
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert there - {*NOT_CODE_OF_OURS} == number.keys()
    against = []
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0]
        if own in NOT_CODE_OF_OURS:
            continue
        names = {name for name in imported(file) if name.startswith("moextend_jax.") and "__version__" not in name}
        against += [f"{file.relative_to(ROOT)}: {name}" for name in names if number[part_of(name)] > number[own]]
    assert not against, against
