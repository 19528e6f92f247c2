#!/bin/sh
# The batch job of slurm.py. Its arguments are the command, which every task runs; JAX reads Slurm's own variables for
# coordinator, number of processes and index. One task that fails ends the job step, so that no other waits for it.
set -eu
exec srun --kill-on-bad-exit=1 "$@"
