#!/usr/bin/env bash
# A sweep as a job array of Slurm, from the root of the project, with the environment activated:
#
#   DATA=DIR sbatch --array=0-3 --gres=gpu:1 sweeps/slurm.sh sweeps/methods.sh
#
# Each task takes the next run that no other has, on the GPUs that Slurm gives it, so that no share is fixed beforehand and
# a task that ends early takes from the others. OUT has to be on a file system that the nodes share and whose locks (flock)
# hold between them. Two minutes before a task's time is up its runs write their checkpoints, and it queues again; one that
# is preempted does the same and Slurm queues it. Flags of sbatch win over those below.
#SBATCH --job-name=multitask-bert
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --cpus-per-task=4
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

[ $# -gt 0 ] || { echo "no sweep given, expected: sbatch ... sweeps/slurm.sh sweeps/methods.sh" >&2; exit 2; }
stop() { kill -TERM "$sweep" 2>/dev/null; }
trap stop TERM
trap 'is_late=yes; stop' USR1
bash "$@" &
sweep=$!
while # a signal ends the waiting, not the sweep, which lets its runs write their checkpoints
    wait "$sweep"
    status=$?
    kill -0 "$sweep" 2>/dev/null
do :; done
# Not by SLURM_JOB_ID, which one of the tasks shares with the whole array.
[ -z "$is_late" ] || scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
exit "$status"
