"""What every test shares: JAX on the CPU with strict broadcasting, quiet logs, and paths.

In: the environment, before JAX starts. Out: the fixtures `shared`, `workdir`, `picture` and `eight_devices`;
the order of files.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts in the background
# What would change what is printed, make a test one process of several, or lead past HF_HOME.
ELSEWHERE = (
    "FORCE_COLOR", "NO_COLOR", "COLUMNS", "LINES", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_MODULES_CACHE",
)  # fmt: skip
for name in [*os.environ]:
    if name in ELSEWHERE or name.startswith("SLURM_"):
        del os.environ[name]
# Nothing is written into the user's home: caches of data sets and of models' code, of this process and those it starts.
HOME = tempfile.TemporaryDirectory(prefix="moextend-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = HOME.name
# Read when the libraries are imported, so set before any test module imports them.
# MOEXTEND_TEST_PLATFORM=cuda runs them on a GPU (docs/benchmarks.md says which).
os.environ["JAX_PLATFORMS"] = os.environ.get("MOEXTEND_TEST_PLATFORM", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("ABSL_MIN_LOG_LEVEL", "2")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Tests compile many small programs and run each a few times: cheap machine code by XLA's older emitters, in one piece,
# takes a quarter of the time. What XLA itself decides (which products exist at all) stays the same. `XLA_FLAGS=`
# compiles as a run does; `make test-all` does so for the smoke tests. libtpu reads the flags too, and ends the process
# where it does not know one: hence the extra options.
CHEAP = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ.setdefault("XLA_FLAGS", CHEAP)
# Tests of sharding need several devices and the rest must not pay for them: those tests run in a pytest of their own
# with this variable set to 8.
DEVICES = int(os.environ.get("MOEXTEND_TEST_DEVICES", "1"))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from PIL import Image  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
# What one test or run of the tests has compiled, the next reads. Processes that tests start do without: some are
# killed, and half an entry would stay.
os.environ["JAX_COMPILATION_CACHE_DIR"] = ""
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# Tracing makes millions of objects that stay; most collections search them for nothing.
gc.set_threshold(200_000, 20, 1000)
jax.config.update("jax_traceback_in_locations_limit", 0)  # places in our code, ten to an operation, that nobody reads
if DEVICES > 1:
    jax.config.update("jax_num_cpu_devices", DEVICES)

from moextend_jax import progress  # noqa: E402

progress.LONG = 3600.0  # what takes a second, and so gets a line, depends on the machine: tests of that set it

SHARED = Path(__file__).parents[2] / "shared"

LONGEST = (
    "test_processes.py", "test_notebooks.py", "test_kernels_aot.py", "test_chain.py", "test_survival.py",
    "test_pipeline.py", "test_export_families.py", "test_export_hf.py", "test_own.py", "test_study.py",
    "test_sharded.py", "test_asking.py", "test_starts.py", "test_kernels.py", "test_cli.py", "test_step.py",
    "test_several.py", "test_fuzz.py", "test_batches.py", "test_serve.py", "test_web.py", "test_woven.py",
    "test_quantised.py", "test_packaging.py", "test_benchmark_run.py", "test_dump_torch.py",
)  # fmt: skip
"""These files come first, so that no process ends with one of them while the others have nothing left."""


ON_GPUS = (
    "test_kernels.py", "test_attention.py", "test_experts.py", "test_quantised.py", "test_isolation.py", "test_step.py",
    "test_generate.py", "test_vision.py", "test_families.py",
)  # fmt: skip
"""Files whose tests run on a GPU too, beside those of tests/parity: `make test-gpu`."""


@pytest.fixture
def cpu_program() -> None:
    """For tests that look into the program as it is compiled for CPUs."""
    if jax.default_backend() != "cpu":
        pytest.skip("looks into the program for CPUs")


def pytest_unconfigure() -> None:
    HOME.cleanup()


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Of eight devices only files that have tests for them: importing the others takes longer than these tests need."""
    if DEVICES > 1 and collection_path.name.startswith("test_"):
        return "eight_devices" not in collection_path.read_text(encoding="utf-8") or None
    return None


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    named = any(os.environ.get(name) for name in ("MOEXTEND_ORACLE", "MOEXTEND_FAMILIES", "MOEXTEND_METHODS"))
    for item in items:
        parity = item.path.parent.name == "parity"
        if named and parity:  # who names a folder of reference numbers wants all of it compared
            item.own_markers = [mark for mark in item.own_markers if mark.name != "slow"]
        if item.path.name in ON_GPUS or parity:
            item.add_marker("gpu")
        if "eight_devices" in getattr(item, "fixturenames", ()):
            item.add_marker("devices")

    def place(item: pytest.Item) -> int:
        return LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.fixture
def bucket_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """gs:// paths can be named without the extra `gcs`; nothing is read there."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: name == "gcsfs" or find(name, *more))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference values beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference values: {SHARED} is absent")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """On a CPU each compiled program holds pieces of memory that Linux maps, 65,530 at most in a process: the next
    compilation is a segmentation fault. What a file of tests has compiled goes when there are many."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 10_000:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of the held-out texts `evaluate` reads the first lines alone: whole ones are most of a tiny run's time."""
    import tiny

    tiny.shorten_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wider than high and of no round size, so that padding, scaling and cutting all show."""
    path = tmp_path_factory.mktemp("picture") / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 57, 3)).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """An empty working directory for a run."""
    path = tmp_path / "workdir"
    path.mkdir()
    return path


@pytest.fixture
def eight_devices() -> None:
    """Marks a test as one of `devices`; skips it unless this pytest was started with eight CPU devices."""
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices: run with MOEXTEND_TEST_DEVICES=8")
