#!/usr/bin/env bash
# Adapters on Transformer Engine's frozen layers compute on the GPU what torch computes, in BF16 and in FP8.
set -euo pipefail

cp "$(dirname "$0")"/{check.py,../beside_torch.py} "$WORK"
docker run --rm --gpus all --network none --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
