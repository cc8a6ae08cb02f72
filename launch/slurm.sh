#!/usr/bin/env bash
# Several machines under Slurm, one prompt to one answer:
#   sbatch --nodes 2 launch/slurm.sh MODEL --instruct --prompt "..."
# For a chat at a terminal, allocate first and run the same line with srun's --pty on node 0.
#SBATCH --job-name=mistral-chat
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "${NPROC_PER_NODE:-8}" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$head:29500" \
  --no-python mistral-chat "$@"
