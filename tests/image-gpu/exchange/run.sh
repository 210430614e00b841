#!/usr/bin/env bash
# Tokens come to the experts of several GPUs as NCCL brings them, where the GPUs read and write each other's memory.
set -euo pipefail

cp "$(dirname "$0")"/{check.py,../on_gpus.py} "$WORK"
# Only several GPUs can do it: with one, the check says so and ends.
docker run --rm --gpus all --network none --ipc host --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
