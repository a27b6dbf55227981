#!/usr/bin/env bash
# One run on several machines under SLURM: one task per machine, which starts a process for each of its GPUs.
#
#   sbatch --nodes=2 scripts/slurm.sh --method DPDM --data_name cifar10_32 --epsilon 10
#
#SBATCH --job-name=dp-image-bench
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -eu

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export PYTHON MASTER

# --kill-on-bad-exit: where one machine fails, the others stop waiting for it.
# shellcheck disable=SC2016  # SLURM_NODEID differs from machine to machine
srun --kill-on-bad-exit=1 bash -c 'exec "$PYTHON" run.py setup=multi_gpu \
    setup.n_gpus_per_node="${SLURM_GPUS_ON_NODE:-4}" setup.n_nodes="$SLURM_NNODES" \
    setup.node_rank="$SLURM_NODEID" setup.master_address="$MASTER" "$@"' run "$@"
