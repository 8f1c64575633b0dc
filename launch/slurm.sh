#!/bin/bash
# One training run under Slurm: sbatch launch/slurm.sh RECIPE RUN_DIRECTORY
# Preempted or at its time limit, the job saves, is queued again and goes on from its last checkpoint.
#SBATCH --job-name=baleen
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@120
set -u

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# SIGTERM reaches every process of the step: each rank ends its step, saves with the others and returns. The job asks
# for its place in the queue again unless the run is done.
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$head:29500" \
    -m baleen -- train "$1" --run "$2" --resume &
step=$!
stopped=0
trap 'stopped=1; kill -TERM $step' TERM
wait $step; status=$?
[ $stopped = 1 ] && { wait $step; status=$?; scontrol requeue "$SLURM_JOB_ID"; }
exit $status
