#!/usr/bin/env bash
# Llama-2-70B in int4, on one GPU of 80 GB, with the 7B model in int4 as the draft. Further flags go
# to generate.py.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
model=${MODEL:-checkpoints/meta-llama/Llama-2-70b-chat-hf}
draft=${DRAFT:-checkpoints/meta-llama/Llama-2-7b-chat-hf}
python generate.py --compile --checkpoint_path "$model/model_int4.g32.pth" \
  --draft_checkpoint_path "$draft/model_int4.g32.pth" --speculate_k 5 \
  --prompt "Hi, my name is" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
