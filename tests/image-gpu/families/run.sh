#!/usr/bin/env bash
# A tiny model of every family goes through the whole flow on the GPU, with a stop and a resume in the middle; and each
# is trained in the other modes too.
set -euo pipefail

for family in deepseek_v3 gpt_oss llama31 qwen25 qwen3; do
    docker run --rm --gpus all --network none --volume "$WORK:/out" "$IMAGE" \
        demo --model "$family" --out "/out/$family" --json >"$WORK/$family.json"
    python3 - "$WORK/$family.json" <<'PYTHON'
import json, sys

result = json.load(open(sys.argv[1]))
assert len(result["checks"]) == 8 and all(check["passed"] for check in result["checks"]), result["checks"]
PYTHON
    for mode in lora sft; do
        docker run --rm --gpus all --network none --volume "$WORK:/out" "$IMAGE" \
            train --model "/out/$family/nemo" --data "/out/$family/data.jsonl" --out "/out/$family-$mode" \
            --mode "$mode" --steps 4 --seq-length 64 --global-batch-size 4 --micro-batch-size 1 >"$WORK/$family-$mode.log"
        grep -q "^step 4/4 loss " "$WORK/$family-$mode.log"
        echo "$family, $mode: $(grep '^step 4/4' "$WORK/$family-$mode.log")"
    done
done
