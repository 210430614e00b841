#!/usr/bin/env bash
# A family with its own pin for one source is built from that pin. The images of other families keep their digests.
set -euo pipefail

model="${IMAGE#slipway/}"
model="${model%%:*}"
git -C "$ROOT" ls-files -z | (cd "$ROOT" && xargs -0 cp --parents -t "$WORK")
cat >>"$WORK/images/llama31.toml" <<'TOML'

[pins.megatron-core]
version = "0.15.2"
commit = "0000000000000000000000000000000000000000" # not used by a variant that is built from archives
archive = "megatron_core-0.15.2.tar.gz"
sha256 = "8397898a0ade70c3ba96fc21335a7e022587bc139b91bf625ef76cd0e66d7b4f"
TOML
build() { (cd "$1" && "$PYTHON" build.py image --model "$2" --variant cpu) 2>&1 | tee "$WORK/log" | tail -1; }
version() { docker run --rm "$1" python -c 'import importlib.metadata as m; print(m.version("megatron-core"))'; }
digest() { docker image inspect --format '{{.Id}}' "$1"; }

before="$(digest "slipway/$model:cpu")"
build "$WORK" llama31
[ "$(version slipway/llama31:cpu)" = 0.15.2 ]
# NeMo's wheel and the locked packages come from the cache.
grep -A1 '\[nemo 1/1\]' "$WORK/log" | grep CACHED
grep -A1 '\[python 1/1\]' "$WORK/log" | grep CACHED
build "$WORK" "$model"
[ "$(digest "slipway/$model:cpu")" = "$before" ]
build "$ROOT" llama31
[ "$(version slipway/llama31:cpu)" = "$(version "slipway/$model:cpu")" ]
