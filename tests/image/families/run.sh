#!/usr/bin/env bash
# The images of two families differ in the last layer only. That layer is small and names the family.
set -euo pipefail

read -ra sources <<<"${SOURCES:-}" # of full
started=$SECONDS
(cd "$ROOT" && "$PYTHON" build.py image --model qwen3 --variant "$VARIANT" --platform "$PLATFORM" "${sources[@]}")
echo "second family: $((SECONDS - started)) s"
[ $((SECONDS - started)) -le 60 ]

layers() { docker image inspect --format '{{range .RootFS.Layers}}{{println .}}{{end}}' "$1" | grep .; }
other="slipway/qwen3:${IMAGE##*:}"
layers "$IMAGE" >"$WORK/one"
layers "$other" >"$WORK/two"
[ "$(wc -l <"$WORK/one")" -eq "$(wc -l <"$WORK/two")" ]
diff <(head -n -1 "$WORK/one") <(head -n -1 "$WORK/two")
[ "$(tail -1 "$WORK/one")" != "$(tail -1 "$WORK/two")" ]

last="$(docker history --human=false --format '{{.Size}}' "$other" | grep -v '^0$' | head -1)"
echo "last layer: $last bytes"
[ "$last" -le 5000000 ]
docker run --rm "$other" grep -q '^family = "qwen3"' /opt/slipway/image.toml
