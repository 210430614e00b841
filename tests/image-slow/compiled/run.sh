#!/usr/bin/env bash
# The variant full is compiled, installed and checked, on small sources that have the traits of the real ones. Extensions
# that need torch first are imported. The log says how far each stage is, and what the image is made of is stated truly.
set -euo pipefail

case "$IMAGE" in *:full) echo "the image itself is full"; exit 0 ;; esac
# shellcheck source=/dev/null
source "$ROOT/tests/image-slow/full/sources.sh"
sources=()
small_sources
name=slipway/llama31:full
trap 'docker image rm --force "$name" >/dev/null' EXIT
build image --architecture 9.0 "${sources[@]}"

grep -E 'te, transformer_engine: ([0-9]+) of \1 objects' "$WORK/log"
grep -E 'apex, amp_C: ([0-9]+) of \1 objects' "$WORK/log"
grep -E 'apex: built in [0-9]+ s, [0-9]+ s of all cores, the largest process had [0-9.]+ GB' "$WORK/log"
grep -E 'import check: [0-9]+ modules, 14 compiled libraries' "$WORK/log"

docker run --rm --network none "$name" python -W ignore -c '
import torch, amp_C, syncbn, fused_rotary_positional_embedding
import transformer_engine'
# Without torch, they are not to be had: the small sources have the trait that they are made for.
if docker run --rm --network none "$name" python -W ignore -c 'import syncbn' 2>"$WORK/err"; then exit 1; fi
grep -q 'libc10.so' "$WORK/err"

# What a pin says is what is installed.
docker run --rm "$name" python -c '
import json, tomllib
from importlib.metadata import version
pins = json.load(open("/opt/slipway/pins.json"))
named = {"nemo": "nemo-toolkit", "apex": "apex", "megatron-core": "megatron-core", "transformer-engine": "transformer-engine"}
for source, distribution in named.items():
    assert pins[source].split()[0] == version(distribution), (source, pins[source], version(distribution))'
[ "$(docker inspect --format '{{index .Config.Labels "org.slipway.architectures"}}' "$name")" = 9.0 ]
