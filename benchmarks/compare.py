"""One step of each stage here and in PyTorch, turn by turn on the same cores, and the ratios.

python benchmarks/compare.py [--torch-python PYTHON] [--threads 2] [--rounds 10] [--stages align,extend,finetune]

In: an interpreter that has torch (default: this one). Out: of every stage a table with PyTorch's two implementations of
experts, and eager ones again with PyTorch's allocator told what ours is. Speed and CPU time there over here, above 1 in
our favour: of the medians, of the fastest steps (both sides without neighbours), and of single rounds; memory here over
there. Exit code 1 where the median is slower than the faster PyTorch's. Labels are on all positions, as PyTorch
computes all logits.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from turns import Worker, race, ratios

HERE = Path(__file__).parent
STAGES = ("align", "extend", "finetune")
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_ARENA_MAX": "1"}
"""What `machine.keep_memory` sets here, as glibc reads it from outside."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter of the torch environment")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--stages", default=",".join(STAGES))
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes as many threads as it may use cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    console, behind = Console(width=130), False
    console.print(f"{_processor()}, {args.threads} cores")
    for stage in args.stages.split(","):
        behind |= _stage(stage, args, console)
    sys.exit(behind)


def _stage(stage: str, args: argparse.Namespace, console: Console) -> bool:
    ours, product = (Worker([sys.executable, str(HERE / "jax_step.py"), name]) for name in (stage, "product"))

    def torch(experts: str, **variables: str) -> Worker:
        options = ["--experts", experts, "--threads", str(args.threads)]
        return Worker([args.torch_python, str(HERE / "torch_step.py"), stage, *options], **variables)

    theirs = {
        "eager experts": torch("eager"),
        "grouped products": torch("grouped_mm"),
        "eager experts, memory kept": torch("eager", **MALLOC),
    }
    workers = [ours, product, *theirs.values()]
    loads = race(workers, rounds=args.rounds)
    rates = [worker.facts["flops"] / worker.median("wall") / 1e9 for worker in (ours, product)]
    tokens, of_torch = ours.facts["tokens"], theirs["eager experts"].facts
    title = f"{stage}: here {tokens / ours.median('wall'):,.0f} tokens/s, {rates[0]:.0f} GFLOP/s, "
    title += f"{rates[0] / rates[1]:.0%} of a large product's {rates[1]:.0f}; load {min(loads):.1f} to {max(loads):.1f}"
    table = Table(
        f"PyTorch {of_torch['torch']}, transformers {of_torch['transformers']}",
        "tokens/s", "speed, here over there", "CPU time", "peak memory", "GB here, there",
        title=title,
    )  # fmt: skip
    for name, worker in theirs.items():
        speed, cpu = (ratios(ours, worker, what) for what in ("wall", "cpu"))
        memory = ours.median("peak_gb"), worker.median("peak_gb")
        table.add_row(
            name, f"{tokens / worker.median('wall'):,.0f}",
            *(f"{of[0]:.2f}, {of[1]:.2f} ({of[2]:.2f} to {of[3]:.2f})" for of in (speed, cpu)),
            f"{memory[0] / memory[1]:.2f}", f"{memory[0]:.2f}, {memory[1]:.2f}",
        )  # fmt: skip
    console.print(table)
    for worker in workers:
        worker.close()
    fastest = min(list(theirs.values())[:2], key=lambda worker: worker.median("wall"))
    return ratios(ours, fastest, "wall")[0] < 1


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    pairs = [line.partition(":") for line in lines]
    named = {what.strip(): value.strip() for what, _, value in pairs}
    return ", ".join(f"{what} {named[what]}" for what in ("model name", "cpu family", "model") if what in named)


if __name__ == "__main__":
    main()
