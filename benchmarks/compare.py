"""One step of each stage here and in PyTorch, on the same number of cores, and the ratio.

python benchmarks/compare.py [--torch-python PYTHON] [--threads 2]

In: an interpreter that has torch (default: this one). Out: a table; in our favour are ratios above 1 in speed and
below 1 in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter of the torch environment")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    sys.path.insert(0, str(ROOT))
    from configs.bench import get_config
    from moextend_jax.bench import bench
    from moextend_jax.settings import from_config_dict

    console = Console()
    ours = bench(from_config_dict(get_config()), console)
    done = subprocess.run(
        [args.torch_python, str(ROOT / "benchmarks" / "torch_step.py"), "--threads", str(args.threads)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    theirs = json.loads(done.stdout)
    table = Table("stage", "labels", "JAX tokens/s", "PyTorch tokens/s", "ratio", "JAX GB", "PyTorch GB", "ratio")
    for name, row in ours.items():
        stage, labels = name.split("/")
        pairs = [(row[key], theirs[stage][key]) for key in ("tokens_per_second", "peak_memory_gb")]
        cells = [f"{x:,.2f}" for ours, torch in pairs for x in (ours, torch, ours / torch)]
        table.add_row(stage, labels, *cells)
    console.print(table)
    console.print("PyTorch computes the logits of all positions: compare with labels = all for the same work")


if __name__ == "__main__":
    main()
