#!/usr/bin/env bash
# Llama-2-70B in bf16 on several GPUs (8 unless GPUS says otherwise), with the 7B model in int4,
# sharded likewise, as the draft. Further flags go to generate.py.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
model=${MODEL:-checkpoints/meta-llama/Llama-2-70b-chat-hf}
draft=${DRAFT:-checkpoints/meta-llama/Llama-2-7b-chat-hf}
torchrun --standalone --nproc_per_node="${GPUS:-8}" generate.py --compile \
  --checkpoint_path "$model/model.pth" \
  --draft_checkpoint_path "$draft/model_int4.g32.pth" --speculate_k 5 \
  --prompt "Hi, my name is" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
