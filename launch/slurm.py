"""A run as a Slurm batch job: one task, and so one JAX process, per GPU (or per node, without GPUs).

    python launch/slurm.py --nodes 2 --gpus-per-node 8 --time 24:00:00 --sbatch=--partition=large \\
        -- run --config mixtral_8x7b --workdir /shared/mixtral

The work directory, the data and this Python environment must be on a file system that all nodes share. Relative paths
are relative to the current folder, there as here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import commands

NOTICE = 300
"""Seconds before the end of the time limit at which tasks are told to save."""


def main(argv: Sequence[str]) -> int:
    parser = commands.parser(__doc__)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0 for nodes without GPUs")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="cores of a process; its workers read data there")
    parser.add_argument("--time", default="24:00:00", help="limit of the job")
    parser.add_argument("--job-name", default="moextend")
    parser.add_argument("--python", default=sys.executable, help="the interpreter on the nodes")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="any other option, repeatable")
    options, moextend = commands.parse(parser, argv)
    gpus = options.gpus_per_node
    # JAX gives each task of a node the GPU of its number: all GPUs must be visible to all tasks, so no --gpus-per-task.
    command = [
        "sbatch",
        f"--job-name={options.job_name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={gpus or 1}",
        *([f"--gpus-per-node={gpus}"] if gpus else []),
        f"--cpus-per-task={options.cpus_per_task}",
        f"--time={options.time}",
        "--requeue",
        "--open-mode=append",  # a job that was put back goes on with its log
        f"--signal=TERM@{NOTICE}",  # without B: for the steps alone; slurm_job.sh relies on it
        *options.sbatch,
        str(commands.ROOT / "launch" / "slurm_job.sh"),
        options.python, "-m", "moextend_jax.cli", *moextend,
    ]  # fmt: skip
    return commands.run(command, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
