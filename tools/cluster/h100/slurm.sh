#!/bin/bash
# Made by tools/cluster/generate.py from run.yaml: change that.
# sbatch slurm.sh
#SBATCH --job-name=gpt2-124m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=512G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
set -u
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
export LLM_CACHE=/shared/tokens
source /shared/llm/.venv/bin/activate
# The others must live to say what happened to the one that is lost.
srun --kill-on-bad-exit=0 python -m llm.main --gin_file=gin_configs/runs/gpt2_124m_text.gin '--gin_bindings=FILES = "/shared/text/*.jsonl.zst"' '--gin_bindings=RUN_DIRECTORY = "/shared/runs/gpt2_124m"' --heartbeat_timeout_seconds=100
code=$?
if [ "$code" -ge 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
