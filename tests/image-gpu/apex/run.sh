#!/usr/bin/env bash
# Every extension of Apex computes on the GPU what torch computes.
set -euo pipefail

cp "$(dirname "$0")"/{check.py,../beside_torch.py} "$WORK"
docker run --rm --gpus all --network none --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
