"""Compiles the plans of docs/plans.md and writes its tables; what was compiled before is taken from work/plans.

    python benchmarks/plans.py [--only TEXT] [--again] [--python PYTHON]

Each line of RUNS is one `moextend plan --json`, minutes of two cores. `--only` compiles those whose line contains the
text; GPU topologies need a PYTHON that has jax[cuda12].
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from moextend_jax.plan.table import describe

HERE = Path(__file__).parents[1]
DOCUMENT, WORK = HERE / "docs" / "plans.md", HERE / "work" / "plans"
GIB = 2**30


class Run(NamedTuple):
    """`mesh` is data, fsdp, expert, tensor; `saved` what remat "layer" keeps, joined by "+". None: the
    configuration's."""

    table: str
    topology: str
    stage: str
    mesh: tuple[int, int, int, int] | None
    saved: str | None
    accumulate: int | None = 1
    options: tuple[str, ...] = ()
    config: str = "mixtral_8x7b"

    @property
    def arguments(self) -> list[str]:
        axes = zip(("data", "fsdp", "expert", "tensor"), self.mesh or (), strict=self.mesh is not None)
        saved = "".join(f"{name!r}," for name in (self.saved or "").split("+") if name)
        return [
            "plan", self.config, "--stage", self.stage, "--topology", self.topology, "--json",
            *(f"--config.mesh.{axis}={size}" for axis, size in axes),
            *([] if self.accumulate is None else [f"--config.{self.stage}.accumulate={self.accumulate}"]),
            *([] if self.saved is None else [f"--config.saved=({saved})"]),
            *self.options,
        ]  # fmt: skip

    @property
    def named(self) -> str:
        """The configuration, with what is not its own."""
        return " ".join((self.config, *(option.removeprefix("--config.") for option in self.options)))


STAGES = ("finetune", "align", "extend", "full")
SAVED = "query+key+value+attended+middle"
WITH_GATE = f"{SAVED}+gate"
ALL = f"{WITH_GATE}+up"
ANCHOR = ("--text_only", "--config.full.length=2048")
RUNS = [
    Run("anchor", "v5p:4x4x4", "extend", (1, 16, 1, 4), saved="", options=ANCHOR),
    Run("anchor", "v5p:4x4x4", "extend", (1, 16, 4, 1), saved="", options=ANCHOR),
    Run("anchor", "v5p:4x4x4", "full", (1, 16, 1, 4), saved="", options=(*ANCHOR, "--config.train_dtype=bfloat16")),
    *(Run("published", "v5p:4x4x4", stage, (1, 8, 1, 8), saved=WITH_GATE, accumulate=2) for stage in STAGES[:3]),
    Run("published", "v5p:4x4x4", "full", (1, 16, 1, 4), saved=""),
    Run("published", "v5p:4x4x4", "finetune", (1, 8, 1, 8), saved=ALL, accumulate=2),
    *(Run("published", "v5p:4x4x4", "finetune", (1, 16, 1, 4), saved=saved) for saved in (SAVED, WITH_GATE)),
    *(Run("published", "v5e:16x16", stage, (1, 32, 1, 8), saved="") for stage in STAGES),
    *(Run("published", "v6e:8x8", stage, (1, 16, 1, 4), saved="") for stage in STAGES),
    *(Run("published", "h100:8", stage, (1, 8, 1, 1), accumulate=4, saved="") for stage in STAGES),
]
INT8, INT4 = ("--config.expert_storage=int8",), ("--config.expert_storage=int4",)
EIGHT_ROWS, ROW_BY_ROW = ("--config.finetune.accumulate=16",), ("--config.finetune.accumulate=128",)
ONE_EXPERT = ("--config.select.new_experts=1", *ROW_BY_ROW)
GPT_OSS = ("--config.base=gpt-oss-20b", "--config.expert_storage=mxfp4", "--config.expert_group=32")
PARTS = ("--config.finetune.batch_size=32", "--config.finetune.accumulate=4")
RUNS += [
    Run("small", topology, "finetune", None, None, None, options, config)
    for config, lines in {
        "mixtral_8x7b:one_host": (
            ("v5e:2x4", INT8),
            ("v5e:2x4", (*INT8, *EIGHT_ROWS)),
            ("v5e:2x4", INT4),
            ("v6e:2x4", ()),
            ("v5p:2x2x1", ()),
        ),
        "mixtral_8x7b:one_gpu": (("h100:1", ()), ("h100:1", ROW_BY_ROW)),
        "qwen3_30b_a3b": (("h100:8", PARTS), ("v6e:2x4", PARTS), ("v5p:2x2x1", PARTS), ("v5e:2x4", (*PARTS, *INT8))),
        "qwen3_30b_a3b:one_gpu": (
            ("h100:1", ()),
            ("rtx4090:1", ONE_EXPERT),
            ("h100:1", GPT_OSS),
            ("rtx4090:1", (*GPT_OSS, *ONE_EXPERT)),
        ),
        "olmoe_1b_7b": (("h100:8", PARTS), ("v5e:2x4", PARTS), ("v6e:2x4", PARTS), ("v5p:2x2x1", PARTS)),
        "olmoe_1b_7b:one_gpu": (("h100:1", ()), ("rtx4090:1", ())),
    }.items()
    for topology, options in lines
]
COLUMNS = {
    "topology": lambda f: f["topology"],
    "stage": lambda f: f["stage"] + ("" if f["images"] else ", text only"),
    "mesh, remat, micro-batches": lambda f: describe(f),
    "rows x length": lambda f: f"{f['rows']} x {f['length']}",
    "fits": lambda f: "yes" if f["fits"] else "**no**",
    "frozen": lambda f: gib(f, "frozen"),
    "trainable": lambda f: gib(f, "trainable"),
    "optimizer": lambda f: gib(f, "optimizer"),
    "temporaries": lambda f: gib(f, "temporaries"),
    "total": lambda f: f"**{gib(f, 'total')}**",
    "TFLOP per chip": lambda f: f"{f['flops_per_step']['per_chip'] / 1e12:,.1f}",
    "compiled / counted": lambda f: ratio(f, "compiled_over_analytic"),
    "of full training": lambda f: ratio(f, "share_of_full_training"),
    "s/step at least": lambda f: f"{f['step_seconds']:.2f} ({f['bound']})",
    "tokens/s": lambda f: f"{f['tokens_per_second']:,.0f}",
    "MFU": lambda f: f"{f['mfu']:.0%}",
    "compiled in": lambda f: f"{f['compile_seconds']:.0f} s ({f['compile_cpu_seconds']:.0f} s of CPU)",
}


def gib(figures: dict[str, Any], kind: str) -> str:
    return f"{figures['bytes_per_chip'][kind] / GIB:.2f}"


def ratio(figures: dict[str, Any], name: str) -> str:
    value = figures["flops_per_step"].get(name)
    return "" if value is None else f"{value:.3f}"


def figures_of(run: Run, *, python: str, chosen: bool, again: bool) -> dict[str, Any] | None:
    of = [] if run.mesh else [run.config.replace(":", "-")]
    name = "_".join((run.table, *of, run.topology.replace(":", "-"), run.stage,
                     "x".join(map(str, run.mesh or ())), str(run.accumulate or ""), run.saved or "",
                     *(re.sub(r"[^\w=]+", "-", option.rpartition(".")[2]) for option in run.options)))  # fmt: skip
    path = WORK / (re.sub("_+", "_", name).rstrip("_") + ".json")
    if path.exists() and not (chosen and again):
        return json.loads(path.read_text()) | {"configuration": run.named}
    if not chosen:
        return None
    print(" ".join(run.arguments), flush=True)
    done = subprocess.run([python, "-m", "moextend_jax.cli", *run.arguments], cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        print(f"  failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(done.stdout)
    return json.loads(done.stdout) | {"configuration": run.named}


def write_table(table: str, rows: list[dict[str, Any]]) -> None:
    """Between the document's two comments with the table's name."""
    columns = ({"configuration": lambda f: f"`{f['configuration']}`"} if table == "small" else {}) | COLUMNS
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(column(figures) for column in columns.values()) for figures in rows]
    made = "\n".join(f"| {line} |" for line in lines)
    start, end = f"<!-- {table} -->", f"<!-- end of {table} -->"
    before, rest = DOCUMENT.read_text().split(start)
    DOCUMENT.write_text(f"{before}{start}\n{made}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only lines that contain this")
    parser.add_argument("--again", action="store_true", help="compile also what was compiled before")
    parser.add_argument("--python", default=sys.executable, help="interpreter to compile with")
    options = parser.parse_args()
    done: dict[str, list[dict[str, Any]]] = {run.table: [] for run in RUNS}
    for run in RUNS:
        chosen = options.only in " ".join((run.table, *run.arguments))
        figures = figures_of(run, python=options.python, chosen=chosen, again=options.again)
        if figures is not None:
            done[run.table].append(figures)
    for table, rows in done.items():
        missing = sum(run.table == table for run in RUNS) - len(rows)  # a clone has none of what was compiled before
        if missing:
            print(f"table {table} stays as it is: {missing} of its lines are not compiled here")
        else:
            write_table(table, rows)


if __name__ == "__main__":
    main()
