#!/usr/bin/env bash
# A build takes less than 20 s after one changed line of a command, and less than 10 s after one of a manifest.
set -euo pipefail

model="${IMAGE#slipway/}" variant="${IMAGE##*:}"
model="${model%%:*}"
# In a copy of the checkout, so that this one is not changed; the store and the engine are the same.
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
# Build the image of this checkout again.
(cd "$ROOT" && "$PYTHON" build.py image --model "$model" --variant "$variant")
