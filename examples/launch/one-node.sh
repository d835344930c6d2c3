#!/usr/bin/env bash
# Train a spec on the GPUs of one machine:  examples/launch/one-node.sh SPEC [NUMBER] [--fsdp | --zero2]
# The rows of a step are shared; the losses are those of one GPU. Ctrl-C saves and ends; run it again to go on.
set -euo pipefail
spec=$1
gpus=${2:-$(nvidia-smi --list-gpus | wc -l)}
if [[ "${3:-}" == "--fsdp" ]]; then
  export ACCELERATE_USE_FSDP=true  # weights, gradients and moments spread over the GPUs, instead of repeated
elif [[ "${3:-}" == "--zero2" ]]; then
  export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=2  # gradients and moments spread by DeepSpeed
fi
exec torchrun --standalone --nproc-per-node "$gpus" -m coatkit train "$spec" --resume
