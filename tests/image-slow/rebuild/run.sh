#!/usr/bin/env bash
# What a small change costs: a line of the commands less than 20 s, a line of a family's manifest less than 10 s.
set -euo pipefail

model="${IMAGE#slipway/}" variant="${IMAGE##*:}"
model="${model%%:*}"
# A checkout of its own, so that nothing of this one is changed; the store and the engine are the same.
git -C "$ROOT" ls-files -z | (cd "$ROOT" && xargs -0 cp --parents -t "$WORK")
build() {
    local started=$SECONDS
    (cd "$WORK" && "$PYTHON" build.py image --model "$model" --variant "$variant") >"$WORK/log" 2>&1 || { tail "$WORK/log"; return 1; }
    took=$((SECONDS - started))
}
build
echo "# changed at $(date +%s%N)" >>"$WORK/entrypoints/slipway/cli.py"
build
echo "a line of entrypoints/: $took s"
[ "$took" -lt 20 ]
echo "# changed at $(date +%s%N)" >>"$WORK/images/$model.toml"
build
echo "a line of the manifest: $took s"
[ "$took" -lt 10 ]
# The image is again what this checkout says.
(cd "$ROOT" && "$PYTHON" build.py image --model "$model" --variant "$variant")
