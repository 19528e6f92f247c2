#!/bin/sh
# The batch job of slurm.py. Its arguments are the command, which every task runs; JAX reads Slurm's own variables for
# coordinator, number of processes and index.
# Slurm tells the tasks (SIGTERM) before it takes the nodes away or the time is up: they save and end with exit code 75,
# and the job goes back into the queue. The first to end must not end the step: another may still close its files, and
# srun would give 137. Of a task that fails the others learn from JAX; --wait (seconds) ends those that do not.
# This shell gets SIGTERM when the job is cancelled (scancel), and not with that notice: --signal without B: signals the
# steps alone. A cancelled job is not put back; nor is one that still saves when its time is up, which looks the same.
set -u
cancelled=
trap 'cancelled=1' TERM
code=0
# srun does not take it from sbatch; where nothing was asked for, the cluster's own default stays.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
srun --kill-on-bad-exit=0 --wait=600 "$@" || code=$?
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
