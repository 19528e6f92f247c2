"""requirements.txt and the extras are ranges that others can share, constraints.txt one version of each, and the wheel
has everything that a run needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]


def lines(name: str) -> list[Requirement]:
    text = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in text if line and not line.startswith("#")]


NEEDED, PINS = lines("requirements.txt"), lines("constraints.txt")
EXTRAS = {name: [Requirement(line) for line in given] for name, given in PROJECT["optional-dependencies"].items()}
USED = [*NEEDED, *(requirement for name, extra in EXTRAS.items() if name != "dev" for requirement in extra)]

pytestmark = pytest.mark.smoke


def chosen(requirements: list[Requirement], python: str) -> list[Requirement]:
    return [one for one in requirements if one.marker is None or one.marker.evaluate({"python_version": python})]


def named(requirements: list[Requirement]) -> dict[str, Requirement]:
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


@pytest.mark.parametrize("requirement", NEEDED, ids=str)
def test_a_requirement_is_a_range_that_is_open_to_newer_versions(requirement: Requirement):
    operators = {spec.operator for spec in requirement.specifier}
    assert ">=" in operators and operators <= {">=", "<"}


@pytest.mark.parametrize("python", PYTHONS)
def test_each_python_gets_one_version_of_each_package_within_its_range(python: str):
    pins = chosen(PINS, python)
    assert len(pins) == len(named(pins)) and {*named(PINS)} == {*named(pins)}
    assert all([spec.operator for spec in pin.specifier] == ["=="] for pin in pins)
    needed = [requirement for requirement in chosen(USED, python) if requirement.specifier]
    assert {*named(NEEDED)} <= {*named(needed)}
    for requirement in needed:
        pin = named(pins).get(canonicalize_name(requirement.name))
        version = next(iter((pin or requirement).specifier)).version
        assert Version(version) in requirement.specifier, requirement


def test_every_tool_of_the_tests_is_pinned():
    assert {*named(EXTRAS["dev"])} <= {*named(PINS)}


def test_the_installed_versions_are_within_their_ranges():
    here = chosen(NEEDED, f"{sys.version_info.major}.{sys.version_info.minor}")
    assert not [str(one) for one in here if metadata.version(one.name) not in one.specifier]


def test_the_entry_point_names_the_command_line():
    assert PROJECT["scripts"] == {"moextend": "moextend_jax.cli:main"}


def test_every_import_of_the_package_is_a_requirement_or_of_an_extra():
    imported = set()
    for path in (ROOT / "moextend_jax").rglob("*.py"):
        if "assets" in path.parts:  # copied into exported folders, never imported here
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.split(".")[0] for name in names}
    known = {*named(USED), "jaxlib"}  # which comes with jax
    distributions = metadata.packages_distributions()
    loose = {
        name
        for name in imported - sys.stdlib_module_names - {"moextend_jax"}
        if not known & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert not loose
    assert not imported & {"tensorflow", "torch"}


def test_dockerfiles_are_clean_and_copy_what_the_installation_reads():
    files = sorted(map(str, (ROOT / "docker").glob("*.Dockerfile")))
    assert len(files) == 2
    for file in files:
        (copied,) = [line for line in Path(file).read_text().splitlines() if line.startswith("COPY pyproject.toml")]
        assert {*copied.split()[1:-1]} == {
            line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")
        } - {"configs", "moextend_jax"} and all((ROOT / name).is_file() for name in copied.split()[1:-1])
    checker = Path(sys.executable).parent / "hadolint"
    if not checker.exists():
        pytest.skip("no hadolint: the dev extra brings it")
    done = subprocess.run([str(checker), *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_has_the_configurations_and_the_small_base(tmp_path: Path):
    build = (
        "import os, sys; os.chdir(sys.argv[1]); from setuptools import build_meta; "
        "print(build_meta.build_wheel(sys.argv[2]))"
    )
    source = tmp_path / "source"
    source.mkdir()
    for name in ("moextend_jax", "configs"):  # as they are, and nothing is written into the checkout
        subprocess.run(["cp", "-r", str(ROOT / name), str(source / name)], check=True)
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, str(source), str(tmp_path)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = {*zipfile.ZipFile(wheel).namelist()}
    for folder, pattern in (("configs", "**/*.py"), ("configs", "**/*.json"), ("moextend_jax", "assets/**/*")):
        paths = [path for path in (ROOT / folder).glob(pattern) if path.is_file() and "__pycache__" not in path.parts]
        prefix = "moextend_jax/configs" if folder == "configs" else folder
        missing = {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in paths} - inside
        assert paths and not missing
