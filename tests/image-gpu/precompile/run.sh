#!/usr/bin/env bash
# The kernels of Triton that a run of each family and mode needs are those that are compiled ahead.
set -euo pipefail

cp "$(dirname "$0")/check.py" "$WORK"
docker run --rm --gpus all --network none --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/check.py
