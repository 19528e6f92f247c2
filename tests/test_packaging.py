"""requirements.txt and the extras are ranges that others can share, constraints.txt one version of each, and the wheel
has everything that a run needs."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import moextend_jax

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
    assert {*named(NEEDED)} <= {*named(needed)} & {*named(pins)}
    for name, requirement in named(needed).items():
        if pin := named(pins).get(name):
            assert Version(next(iter(pin.specifier)).version) in requirement.specifier, requirement


@pytest.mark.parametrize("python, refused", [("3.10", True), *((python, False) for python in PYTHONS), ("3.14", True)])
def test_make_takes_the_pythons_that_are_supported_and_names_them(tmp_path: Path, python: str, refused: bool):
    """With a newer one pip failed at the first package that it could not build."""
    stand_in, version = tmp_path / "python", tuple(map(int, python.split(".")))
    says = f'exec "{sys.executable}" -c "import sys; sys.version_info = {version}; $2"'
    stand_in.write_text(f'#!/bin/sh\n[ "$1" != -c ] || {says}\nexit 3\n')
    stand_in.chmod(0o755)
    command = ["make", "-C", str(ROOT), "env", f"PYTHON={stand_in}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode and ("is not Python 3.11 to 3.13: name one that is" in done.stderr) == refused


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


# --- wheel and sdist --------------------------------------------------------------------------------------------------

BUILD = """
import os, sys
from setuptools import build_meta
os.chdir(sys.argv[1])
print(getattr(build_meta, f"build_{sys.argv[2]}")(sys.argv[3]))
"""


def built(source: Path, kind: str, folder: Path) -> Path:
    """A wheel or an sdist of a source tree, in `folder`."""
    done = subprocess.run([sys.executable, "-c", BUILD, source, kind, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built: nothing is written into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("moextend_jax", "configs"):  # as they are: one has a link to the other
        # Without byte code, which other tests write meanwhile.
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE", "MANIFEST.in"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(source, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_has_the_configurations_and_the_small_base(wheel: Path):
    assert wheel.name.startswith(f"moextend_jax-{moextend_jax.__version__}-")
    inside = {*zipfile.ZipFile(wheel).namelist()}
    for folder, pattern in (("configs", "**/*.py"), ("configs", "**/*.json"), ("moextend_jax", "assets/**/*")):
        paths = [path for path in (ROOT / folder).glob(pattern) if path.is_file() and "__pycache__" not in path.parts]
        prefix = "moextend_jax/configs" if folder == "configs" else folder
        missing = {f"{prefix}/{path.relative_to(ROOT / folder)}" for path in paths} - inside
        assert paths and not missing


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path):
    sdist = built(source, "sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert not (unpacked / "tests").exists()
    first, second = (zipfile.ZipFile(path) for path in (wheel, built(unpacked, "wheel", tmp_path)))
    assert {*first.namelist()} == {*second.namelist()}
    record = f"moextend_jax-{moextend_jax.__version__}.dist-info/RECORD"  # the others in the order of the folder
    assert not [name for name in first.namelist() if name != record and first.read(name) != second.read(name)]


@pytest.mark.slow
def test_the_wheel_runs_the_demo_where_there_is_no_repository(wheel: Path, tmp_path: Path):
    """In an environment that borrows the packages of this one, but not this one's own moextend_jax."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # .pth files in there are not read
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    assert run(str(python), "-c", "import moextend_jax; print(moextend_jax.__file__)").startswith(str(packages))
    moextend = str(tmp_path / "venv" / "bin" / "moextend")
    for text in (packages / "moextend_jax" / "assets" / "text").glob("*.txt"):  # whole ones are most of the time
        text.write_text("".join(text.read_text().splitlines(keepends=True)[:8]))
    less = [f"--config.{stage}.{of}" for stage in ("align", "extend", "finetune") for of in ("steps=2", "batch_size=8")]
    less += ["--config.select.held_out=32", "--config.select.batch_size=8", "--config.evaluate.questions=8"]
    run(moextend, "demo", "--workdir", "work", *less)
    assert (tmp_path / "work" / "report.html").is_file() and (tmp_path / "work" / "summary.json").is_file()
    assert run(moextend, "--version") == f"moextend_jax {moextend_jax.__version__}\n"
