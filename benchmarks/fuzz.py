"""Fuzzes every reader of files from elsewhere, each in a process of its own under limits of time and memory.

python benchmarks/fuzz.py                        all readers (hours; with --cases 1000 half an hour on a busy core)
python benchmarks/fuzz.py --cases 200 gguf       fewer cases, some readers

In: nothing; tests/fuzzing.py writes valid files and changes them by seeds 0, 1, ... Out: a table, and what went wrong
with the seed that shows it again; exit code 1 if anything did. A case goes wrong if it raises anything but a
`MoextendError`, reads what the format's own library does not, ends or stops its process, or goes over the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

SECONDS, BYTES = 20, 512 << 20
"""What one case may take, of time and of address space beyond what its process has."""
DEAR = {"tokenizer.model": 4, "tokenizer_config.json": 20, "import": 2, "delta": 2}
"""Readers whose cases take so many times longer get so many fewer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000, help="per reader, fewer of slow ones (%(default)s)")
    parser.add_argument("readers", nargs="*", help="default all")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _child(options.child, range(options.first, options.cases))
        return
    names = options.readers or json.loads(
        _python("-c", "import json, fuzzing; print(json.dumps(list(fuzzing.READERS)))")
    )
    table = Table(title="Fuzzing the readers")
    for column in ("reader", "cases", "refused", "read", "wrong", "slowest, s", "most memory, MB", "minutes"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    faults: list[str] = []
    for name in names:
        started = time.perf_counter()
        found = _reader(name, options.cases // DEAR.get(name, 1))
        faults += found["faults"]
        table.add_row(
            name, f"{found['cases']:,}", f"{found['refused']:,}", f"{found['read']:,}", f"{len(found['faults'])}",
            f"{found['seconds']:.2f}", f"{found['bytes'] / 1e6:.1f}", f"{(time.perf_counter() - started) / 60:.1f}",
        )  # fmt: skip
        print(f"{name}: {found['cases']:,} cases, {len(found['faults'])} wrong", file=sys.stderr)
    Console(width=120).print(table)
    for fault in faults:
        print(fault)
    sys.exit(bool(faults))


def _reader(name: str, cases: int) -> dict[str, Any]:
    """All cases of a reader; after one that killed or stopped its process, a new one goes on behind it."""
    total: dict[str, Any] = {"cases": 0, "refused": 0, "read": 0, "seconds": 0.0, "bytes": 0, "faults": []}
    first = 0
    while first < cases:
        command = [sys.executable, __file__, "--child", name, "--cases", str(cases), "--first", str(first)]
        # Unbuffered, since `select` knows nothing of lines that Python holds; and nobody reads errors meanwhile.
        with (
            tempfile.TemporaryFile() as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=_environment(), bufsize=0) as child,
        ):
            assert child.stdout
            why, ready = "", False
            while True:
                # The first line comes when the libraries are there and the valid file has been read.
                if not select.select([child.stdout], [], [], SECONDS if ready else 180)[0]:
                    child.kill()
                    why = f"took more than {SECONDS} s"
                    break
                line = child.stdout.readline()
                if not line:
                    break
                said = json.loads(line)
                if "seed" not in said:
                    ready = True
                    continue
                first = said["seed"] + 1
                total["cases"] += 1
                total["seconds"] = max(total["seconds"], said["seconds"])
                total["bytes"] = max(total["bytes"], said["bytes"])
                if said["came"] in ("refused", "read"):
                    total[said["came"]] += 1
                else:
                    total["faults"].append(f"{name}, seed {said['seed']}: {said['came']}")
            child.wait()
            errors.seek(0)
            said_last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
        if not ready:
            sys.exit(f"{name} does not read its own valid file: {' '.join(said_last)}")
        if first < cases:
            why = why or f"ended its process (code {child.returncode}) {' '.join(said_last)}"
            total["faults"].append(f"{name}, seed {first}: {why}")
            total["cases"] += 1
            first += 1
    return total


def _child(name: str, seeds: range) -> None:
    import fuzzing  # pyright: ignore[reportMissingImports]  of tests/, in this process's path

    os.nice(10)
    warnings.simplefilter("error")
    with tempfile.TemporaryDirectory() as folder:
        opened = fuzzing.open_reader(name, Path(folder) / "fuzzed")
        page = os.sysconf("SC_PAGE_SIZE")
        size = int(Path("/proc/self/statm").read_text().split()[0]) * page
        resource.setrlimit(resource.RLIMIT_AS, (size + BYTES, size + BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        print(json.dumps({"ready": True}), flush=True)
        for seed in seeds:
            before, started = _memory(), time.perf_counter()
            try:
                came = fuzzing.run_case(opened, name, seed)
            except BaseException as error:
                at = traceback.extract_tb(error.__traceback__)[-1]
                came = f"{type(error).__name__}: {str(error)[:300]!r} ({Path(at.filename).name}:{at.lineno})"
            seconds = time.perf_counter() - started
            taken = max(0, _memory(peak=True) - before)
            print(json.dumps({"seed": seed, "came": came, "seconds": seconds, "bytes": taken}), flush=True)


def _memory(*, peak: bool = False) -> int:
    """Resident bytes now, from where the peak is counted again; or that peak."""
    if not peak:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def _python(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], env=_environment(), check=True, capture_output=True
    ).stdout.decode()


if __name__ == "__main__":
    main()
