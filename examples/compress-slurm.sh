#!/usr/bin/env bash
# A checkpoint compressed by a Slurm array, a part a node, on a file system that all of them see:
#   sbatch --array=1-8 examples/compress-slurm.sh /models/Llama /models/Llama-kvpack --bits 4.25
# A task that was killed or requeued goes on; the task that ends last completes the output.
#SBATCH --job-name=kvpack --cpus-per-task=16 --mem=64G --requeue
set -euo pipefail
source=$1 output=$2
shift 2
exec kvpack compress "$source" -o "$output" --shards "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
  --threads "${SLURM_CPUS_PER_TASK:-1}" --json "$@"
