"""Compiled programs are kept between starts, in a folder of their own that does not grow for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from moextend_jax import compile_cache, distributed, doctor
from moextend_jax.config import MoextendError

PROGRAM = """
import jax, jax.numpy as jnp
from moextend_jax import distributed
distributed.start()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.arange(9.0).reshape(3, 3)).tolist())
"""


def cache_dir() -> str | None:
    return jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] (JAX adds its own)


def start(**environment: str) -> str:
    unset = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True,
        env=unset | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_second_start_reads_what_the_first_compiled(tmp_path: Path):
    first = start(XDG_CACHE_HOME=str(tmp_path))
    (place,) = (tmp_path / "moextend_jax" / "compile").iterdir()
    entries = {path.name: path.stat().st_mtime_ns for path in place.glob("*-cache")}
    assert len(entries) >= 1 and (place.stat().st_mode & 0o077) == 0  # what lies in it is run
    assert start(XDG_CACHE_HOME=str(tmp_path)) == first
    assert {path.name: path.stat().st_mtime_ns for path in place.glob("*-cache")} == entries


@pytest.mark.slow
def test_the_environment_has_the_last_word(tmp_path: Path):
    start(XDG_CACHE_HOME=str(tmp_path / "unused"), JAX_COMPILATION_CACHE_DIR="")
    start(XDG_CACHE_HOME=str(tmp_path / "unused"), JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named"))
    assert not (tmp_path / "unused").exists() and list((tmp_path / "named").glob("*-cache"))


def test_a_home_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    before = cache_dir()
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        compile_cache.enable()
        assert cache_dir() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_what_was_read_longest_ago_goes_first(tmp_path: Path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        (tmp_path / f"{name}-cache").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{name}-cache", (1000 - age, 500))
    compile_cache.prune(tmp_path, most=250)
    assert {path.name for path in tmp_path.iterdir()} == {"newest-cache", "middle-cache"}


def test_doctor_says_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    (tmp_path / "a-cache").write_bytes(b"x" * 3_000_000)
    assert doctor.compiled().value == f"{tmp_path}: 1 programs, 3 MB"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert doctor.compiled().value.startswith("none")


@pytest.mark.parametrize("accelerator", ["", "gpu", "tpu"])
def test_several_processes_go_without_where_all_wait_for_one(accelerator: str, monkeypatch: pytest.MonkeyPatch):
    """Only process 0 writes the cache: it would have its program at once, and wait for those that compile."""
    enabled: list[bool] = []

    def alone(**_: object) -> None:
        raise ValueError("nobody answers")

    monkeypatch.setattr(distributed, "arguments", dict)
    monkeypatch.setattr(distributed.machine, "accelerator", lambda: accelerator)
    monkeypatch.setattr(distributed.compile_cache, "enable", lambda: enabled.append(True))
    monkeypatch.setattr(distributed.jax.distributed, "initialize", alone)
    with pytest.raises(MoextendError, match="do not find each other: nobody answers; start all of them, or go alone"):
        distributed.start()
    assert enabled == ([True] if accelerator == "tpu" else [])
