#!/bin/bash
# One training run under Slurm: sbatch launch/slurm.sh RECIPE RUN_DIRECTORY [further options of `baleen train`]
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

export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100  # seconds that a rank has to save in, within Slurm's own grace time
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else a restart meets the addresses of the ranks before it
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Slurm sends SIGTERM to the processes of the step and not to this script. Each rank then ends its training step, saves
# with the others and returns; the shell around torchrun remembers, and asks for the job's place in the queue again.
srun --kill-on-bad-exit=1 bash -c '
    trap "interrupted=1" TERM
    torchrun "$@" &
    wait $!; status=$?
    [ -n "${interrupted:-}" ] || exit $status
    wait
    [ "$SLURM_PROCID" != 0 ] || scontrol requeue "$SLURM_JOB_ID"' torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_ON_NODE}" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv-endpoint "$head:${MASTER_PORT:-29500}" \
    -m baleen -- train "$1" --run "$2" --resume "${@:3}"
