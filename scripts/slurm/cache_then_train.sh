#!/usr/bin/env bash
# Two jobs, of which the second begins when the first has ended well: activations to disk, then training from them, each
# by a process for each GPU of a node. Run it on the login node, not with sbatch; it submits both:
#   CACHE=/scratch/cache GPUS=8 scripts/slurm/cache_then_train.sh
set -euo pipefail

model=${MODEL:-meta-llama/Llama-3.1-8B}
dataset=${DATASET:-/data/text}
cache=${CACHE:-$PWD/activations}
run_dir=${RUN_DIR:-$PWD/runs}
tokens=${TOKENS:-100_000_000}
hook=blocks.16.hook_resid_post
gpus=${GPUS:-8}
wide=(--nodes=1 --ntasks-per-node=1 --gpus-per-node="$gpus" --cpus-per-task=$((8 * gpus)) --mem=0 --requeue)

# What a job runs is written out as one line, quoted word by word.
quoted() { printf '%q ' "$@"; }

write=$(quoted env OMP_NUM_THREADS=8 torchrun --standalone --nproc_per_node "$gpus" -m sae_training \
    cache "$model" "$dataset" --hook_point "$hook" --device cuda \
    --total_training_tokens "$tokens" --cached_activations_path "$cache")
train=$(quoted env OMP_NUM_THREADS=8 torchrun --standalone --nproc_per_node "$gpus" -m sae_training \
    train "$model" "$dataset" --hook_point "$hook" --device cuda \
    --n_latents 65536 --k 64 --total_training_tokens "$tokens" --run_dir "$run_dir" --run_name cached \
    --use_cached_activations True --cached_activations_path "$cache")

# Either goes on where it was, if SLURM requeues it.
first=$(sbatch --parsable --job-name=sae-cache --time=12:00:00 --output=%x-%j.log "${wide[@]}" --wrap "$write")
sbatch --job-name=sae-train --time=12:00:00 --output=%x-%j.log "${wide[@]}" --kill-on-invalid-dep=yes \
    --dependency="afterok:${first%%;*}" --wrap "$train"
