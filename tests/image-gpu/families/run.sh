#!/usr/bin/env bash
# A tiny model of every family goes through the whole flow on the GPU, with a stop and a resume in the middle; and each
# is trained in the other modes too. All at once: they wait for the host more than for the GPU.
set -euo pipefail

run() { docker run --rm --gpus all --network none --volume "$WORK:/out" "$IMAGE" "$@"; }

go_through() {
    local family="$1"
    run demo --model "$family" --out "/out/$family" --json >"$WORK/$family.json"
    python3 - "$WORK/$family.json" <<'PYTHON'
import json, sys

result = json.load(open(sys.argv[1]))
assert len(result["checks"]) == 8 and all(check["passed"] for check in result["checks"]), result["checks"]
PYTHON
    for mode in lora sft; do
        run train --model "/out/$family/nemo" --data "/out/$family/data.jsonl" --out "/out/$family-$mode" \
            --mode "$mode" --steps 4 --seq-length 64 --global-batch-size 4 --micro-batch-size 1 >"$WORK/$family-$mode.log" 2>&1
        echo "$family, $mode: $(grep '^step 4/4 loss ' "$WORK/$family-$mode.log")"
    done
}

declare -A started
for family in deepseek_v3 gpt_oss llama31 qwen25 qwen3; do
    go_through "$family" &
    started[$family]=$!
done
failed=0
for family in "${!started[@]}"; do
    wait "${started[$family]}" || { echo "$family failed"; tail -20 "$WORK/$family"*.log; failed=1; }
done
[ "$failed" -eq 0 ]
