#!/usr/bin/env bash
# CodeLlama-34B-Python in bf16 with the 7B model in int4 as the draft. Further flags go to generate.py.
set -euo pipefail
CDPATH= cd "$(dirname "$0")/.."
model=${MODEL:-checkpoints/codellama/CodeLlama-34b-Python-hf}
draft=${DRAFT:-checkpoints/codellama/CodeLlama-7b-Python-hf}
python generate.py --compile --checkpoint_path "$model/model.pth" \
  --draft_checkpoint_path "$draft/model_int4.g32.pth" --speculate_k 8 \
  --prompt "def quicksort(arr):" --max_new_tokens 200 --num_samples 5 --temperature 0 "$@"
