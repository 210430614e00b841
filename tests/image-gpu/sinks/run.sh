#!/usr/bin/env bash
# Attention with sinks where two GPUs share packed samples is that of one.
set -euo pipefail

cp "$(dirname "$0")"/{check.py,../on_gpus.py} "$WORK"
# Only two GPUs can do it: with one, the check says so and ends.
docker run --rm --gpus all --network none --ipc host --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
