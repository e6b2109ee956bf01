#!/usr/bin/env bash
# Download a model from the Hugging Face hub into ./checkpoints and convert it to model.pth.
set -euo pipefail

if [[ $# -eq 0 || $1 == -* ]]; then
    echo "usage: scripts/prepare.sh <org/name> [--hf_token TOKEN] [--revision REVISION]" >&2
    exit 2
fi

scripts=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if ! python=$(command -v python || command -v python3); then
    echo "error: there is no python in PATH; install Python 3.10 or newer" >&2
    exit 2
fi
folder=$("$python" "$scripts/download.py" --repo_id "$@")
"$python" "$scripts/convert_hf_checkpoint.py" --checkpoint_dir "$folder"
