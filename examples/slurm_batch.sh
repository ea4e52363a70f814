#!/bin/bash
# A batch job as a SLURM array: every task makes its share of the shards, and a task that runs out of time goes back into
# the queue and goes on.
#
#   sbatch --array=0-15 examples/slurm_batch.sh fashion.qdm samples 1000000 --steps 50 --batch-size 64
#
#SBATCH --job-name=qdm-batch
#SBATCH --array=0-15
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
set -euo pipefail

bundle=$1 out=$2 num=$3
shift 3

# SLURM_ARRAY_TASK_ID and SLURM_ARRAY_TASK_COUNT say which shards these are. 180 seconds before the end SLURM sends
# SIGUSR1 to this shell: a shard that needs no more than 150 is finished, another is dropped.
qdm-deploy batch "$bundle" --num "$num" --out "$out" --grace 150 "$@" &
worker=$!

heard=0
trap 'heard=1; kill -USR1 "$worker" 2>/dev/null || true' USR1 TERM
while true; do
    heard=0 code=0
    wait "$worker" || code=$?
    # A signal ends the wait, not the worker.
    [ "$heard" = 1 ] || break
done

if [ "$code" = 75 ]; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    code=0
fi
exit "$code"
