#!/usr/bin/env bash
# `docker compose` accepts the compose files, and their two nodes run in this image with every setting of the files.
# Each prints the torchrun command that it would start, as node 0 and node 1 of two.
set -euo pipefail

export IMAGE DATA="$WORK/data" GPUS=1
mkdir --mode=777 "$DATA"
compose=(docker compose --project-name "slipway-compose-$$" --file "$ROOT/deploy/compose.yaml")
"${compose[@]}" --file "$ROOT/deploy/compose.gpu.yaml" config --quiet
# An engine that runs in a container itself may not raise the limit on locked memory.
locked=unlimited
if ! docker run --rm --ulimit memlock=-1 "$IMAGE" true 2>/dev/null; then
    locked="$(docker run --rm "$IMAGE" bash -c 'ulimit -l')"
    printf 'services:\n  node0: {ulimits: !reset null}\n  node1: {ulimits: !reset null}\n' >"$WORK/limits.yaml"
    compose+=(--file "$WORK/limits.yaml")
fi
trap '"${compose[@]}" down --timeout 1 >/dev/null 2>&1' EXIT

docker run --rm --volume "$DATA:/data" "$IMAGE" python -W ignore -c '
from pathlib import Path
from slipway.families import gpt_oss
from slipway.families.fabricate import fabricate
texts = [file.read_text() for file in sorted(Path("/opt/slipway/entrypoints").rglob("*.py"))]
fabricate(Path("/data/hf"), gpt_oss.tiny_config(), texts, quantized=True)'
docker run --rm --volume "$DATA:/data" "$IMAGE" import /data/hf /data/nemo
docker run --rm --volume "$DATA:/data" "$IMAGE" \
    preprocess /opt/slipway/entrypoints /data/tokens.jsonl --tokenizer /data/nemo --seq-length 128
for node in 0 1; do
    "${compose[@]}" run --rm --no-deps -T "node$node" \
        train --model /data/nemo --data /data/tokens.jsonl --out /data/run --nodes 2 --nproc-per-node 1 \
        --master-addr node0 --seq-length 128 --micro-batch-size 2 --global-batch-size 8 --dry-run >"$WORK/out" 2>&1 ||
        { cat "$WORK/out"; exit 1; }
    if ! { grep -q -- "--node-rank=$node" "$WORK/out" && grep -q -- '--nnodes=2' "$WORK/out"; }; then
        cat "$WORK/out"
        exit 1
    fi
done
# The container has the limits that the files ask for.
"${compose[@]}" run --rm --no-deps -T node0 bash -c 'df --block-size=1G --output=size /dev/shm | tail -1; ulimit -l' \
    >"$WORK/limits"
if ! { grep -qx ' *16' "$WORK/limits" && grep -qx "$locked" "$WORK/limits"; }; then
    cat "$WORK/limits"
    exit 1
fi
