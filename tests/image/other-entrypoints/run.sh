#!/usr/bin/env bash
# The package index has a module called entrypoints, and our source root has the same name. With that module installed,
# and first on Python's path, every command still works.
set -euo pipefail

# A stand-in for that package: a module with its metadata, in site-packages as an installer leaves it. It is on
# PYTHONPATH too, before everything of ours.
mkdir -p "$WORK/other/entrypoints-0.4.dist-info"
echo 'OWNER = "another project"' >"$WORK/other/entrypoints.py"
printf 'Metadata-Version: 2.1\nName: entrypoints\nVersion: 0.4\n' >"$WORK/other/entrypoints-0.4.dist-info/METADATA"
site=/opt/venv/lib/python3.11/site-packages
run=(docker run --rm --network none --env PYTHONPATH=/other --volume "$WORK:/work" --volume "$WORK/other:/other:ro")
for name in entrypoints.py entrypoints-0.4.dist-info; do run+=(--volume "$WORK/other/$name:$site/$name:ro"); done
run+=("$IMAGE")
[ "$("${run[@]}" python -c 'import entrypoints; print(entrypoints.OWNER)')" = "another project" ]
"${run[@]}" python -c 'from importlib.metadata import version; assert version("entrypoints") == "0.4"'

# Every command starts, by both names.
"${run[@]}" slipway --help | awk '/^  [a-z]/ {print $1}' >"$WORK/commands"
[ "$(wc -l <"$WORK/commands")" -ge 9 ]
# shellcheck disable=SC2016,SC2046 # the inner shell expands $command; each command is a word
"${run[@]}" bash -c '
    for command in "$@"; do
        slipway "$command" --help | grep -q "Usage: slipway $command" || { echo "slipway $command"; exit 1; }
        # type -P: a command of the shell itself is called export too.
        "$(type -P "$command")" --help | grep -q "Usage: slipway $command" || { echo "$command"; exit 1; }
    done' - $(cat "$WORK/commands")
"${run[@]}" version --json | python3 -c 'import json, sys; assert json.load(sys.stdin)["nemo"]["version"]'

# Commands that read and write models do their work, some of it in processes of their own.
"${run[@]}" python -W ignore -c '
from pathlib import Path
from slipway.families import gpt_oss
from slipway.families.fabricate import fabricate
texts = [file.read_text() for file in sorted(Path("/opt/slipway/entrypoints").rglob("*.py"))]
fabricate(Path("/work/hf"), gpt_oss.tiny_config(), texts, quantized=True)'
"${run[@]}" inspect /work/hf | grep gpt_oss
"${run[@]}" dequant /work/hf /work/bf16
"${run[@]}" import /work/hf /work/nemo
"${run[@]}" verify /work/bf16 /work/nemo
"${run[@]}" preprocess /opt/slipway/entrypoints /work/data.jsonl --tokenizer /work/nemo --seq-length 128
"${run[@]}" train --model /work/nemo --data /work/data.jsonl --out /work/run --steps 1 --seq-length 128 \
    --micro-batch-size 2 --global-batch-size 4 --nproc-per-node 1
"${run[@]}" extract-heads /work/run/checkpoints/step=1 /work/heads
"${run[@]}" export /work/nemo /work/again
"${run[@]}" doctor --json >"$WORK/doctor.json" || [ $? -eq 78 ]
python3 -c 'import json, sys; json.load(open(sys.argv[1]))' "$WORK/doctor.json"
