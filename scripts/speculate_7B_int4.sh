#!/usr/bin/env bash
# Llama-2-7B in bf16 with its own int4 copy as the draft. Further flags go to generate.py.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
model=${MODEL:-checkpoints/meta-llama/Llama-2-7b-chat-hf}
python generate.py --compile --checkpoint_path "$model/model.pth" \
  --draft_checkpoint_path "$model/model_int4.g32.pth" --speculate_k 5 \
  --prompt "Hi, my name is" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
