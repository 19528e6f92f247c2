"""The environment is the pinned one, and holds every library that the package imports."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
PINS = [Requirement(line) for line in LINES]

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("pin", PINS, ids=str)
def test_every_requirement_is_pinned_to_one_version(pin: Requirement) -> None:
    assert [spec.operator for spec in pin.specifier] == ["=="]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_each_package_once(python: str) -> None:
    chosen = [pin.name for pin in PINS if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(chosen) == len(set(chosen))
    assert {pin.name for pin in PINS} == set(chosen)


def test_the_installed_versions_are_the_pinned_ones() -> None:
    wrong = {
        pin.name: metadata.version(pin.name)
        for pin in PINS
        if (pin.marker is None or pin.marker.evaluate()) and metadata.version(pin.name) not in pin.specifier
    }
    assert not wrong


def test_the_entry_point_names_the_command_line() -> None:
    assert PROJECT["scripts"] == {"moextend": "moextend_jax.cli:main"}


def test_every_import_of_the_package_is_a_pinned_requirement_or_extra() -> None:
    imported = set()
    for path in (ROOT / "moextend_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.split(".")[0] for name in names}
    extras = [
        Requirement(line) for name in ("plan", "eval", "gpu", "gcs") for line in PROJECT["optional-dependencies"][name]
    ]
    assert all(str(extra.specifier).startswith("==") for extra in extras)
    pinned = {canonicalize_name(pin.name) for pin in [*PINS, *extras]}
    distributions = metadata.packages_distributions()
    loose = {
        name
        for name in imported - sys.stdlib_module_names - {"moextend_jax"}
        if not pinned & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert not loose
    assert not imported & {"tensorflow", "torch"}
