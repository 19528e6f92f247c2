#!/bin/sh
# The batch job of slurm.py. Its arguments are the command, which every task runs; JAX reads Slurm's own variables for
# coordinator, number of processes and index. One task that fails ends the job step, so that no other waits for it.
# Slurm tells the tasks (SIGTERM) before it takes the nodes away or the time is up: they save and end with exit code 75,
# and the job goes back into the queue.
set -u
trap : TERM
code=0
srun --kill-on-bad-exit=1 "$@" || code=$?
if [ "$code" -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
