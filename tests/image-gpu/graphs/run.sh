#!/usr/bin/env bash
# A frozen base with adapters computes the same as CUDA graphs and without them: dense, experts and sinks, BF16 and FP8.
set -euo pipefail

cp "$(dirname "$0")"/{check.py,../beside_torch.py} "$WORK"
docker run --rm --gpus all --network none --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
