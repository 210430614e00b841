#!/usr/bin/env bash
# Two containers on a Docker network train the heads together; their losses equal those of one container to the bit.
set -euo pipefail

network="slipway-two-nodes-$$"
trap 'docker rm --force "$network-1" >/dev/null 2>&1; docker network rm "$network" >/dev/null 2>&1' EXIT
docker network create "$network" >/dev/null

run=(docker run --rm --volume "$WORK:/work")
"${run[@]}" "$IMAGE" python -W ignore -c '
from pathlib import Path
from slipway.families import gpt_oss
from slipway.families.fabricate import fabricate
texts = [file.read_text() for file in sorted(Path("/opt/slipway/entrypoints").rglob("*.py"))]
fabricate(Path("/work/hf"), gpt_oss.tiny_config(), texts, quantized=True)'
"${run[@]}" "$IMAGE" import /work/hf /work/nemo
"${run[@]}" "$IMAGE" preprocess /opt/slipway/entrypoints /work/data.jsonl --tokenizer /work/nemo --seq-length 128

train=(train --model /work/nemo --data /work/data.jsonl --steps 6 --seq-length 128 --micro-batch-size 2
    --global-batch-size 8 --lr 2e-3 --warmup-steps 2 --constant-steps 2)
"${run[@]}" "$IMAGE" "${train[@]}" --out /work/one --nproc-per-node 2

nodes=("${train[@]}" --out /work/two --nodes 2 --nproc-per-node 1 --master-addr node0)
"${run[@]}" --network "$network" --name "$network-1" "$IMAGE" "${nodes[@]}" --node-rank 1 >"$WORK/node1.log" 2>&1 &
second=$!
"${run[@]}" --network "$network" --hostname node0 --network-alias node0 "$IMAGE" "${nodes[@]}" --node-rank 0
wait "$second" || { cat "$WORK/node1.log"; exit 1; }

python3 - "$WORK" <<'PYTHON'
import json, sys

one, two = ([json.loads(line)["loss"] for line in open(f"{sys.argv[1]}/{run}/metrics.jsonl")] for run in ("one", "two"))
print(one, two)
assert len(one) == 6 and one == two
PYTHON
