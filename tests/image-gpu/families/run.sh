#!/usr/bin/env bash
# A tiny model of every family goes through the whole flow on the GPU, with a stop and a resume in the middle; and each
# is trained in the other modes too, as CUDA graphs and without. All at once: they wait for the host more than for the
# GPU.
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
        train "$family" "$mode" true
        train "$family" "$mode" false
    done
    grep -q "recorded the layers as CUDA graphs" "$WORK/$family-lora-true.log"
}

train() {
    local family="$1" mode="$2" graphs="$3" name="$1-$2-$3"
    run train --model "/out/$family/nemo" --data "/out/$family/data.jsonl" --out "/out/$name" --mode "$mode" --steps 6 \
        --seq-length 64 --global-batch-size 4 --micro-batch-size 1 --cuda-graphs="$graphs" >"$WORK/$name.log" 2>&1
    echo "$family, $mode, graphs $graphs: $(grep '^step 6/6 loss ' "$WORK/$name.log")"
    [ "$graphs" = true ] || same_losses "$WORK/$family-$mode-true.log" "$WORK/$name.log"
}

same_losses() {
    python3 - "$@" <<'PYTHON'
import re, sys

one, other = ([float(loss) for loss in re.findall(r"^step \d+/6 loss (\S+)", open(log).read(), re.M)] for log in sys.argv[1:])
assert len(one) == 6 and all(abs(a - b) < 2e-3 * a for a, b in zip(one, other)), (one, other)
PYTHON
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
