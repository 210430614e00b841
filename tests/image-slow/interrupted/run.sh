#!/usr/bin/env bash
# An interrupt while Debian packages are unpacked leaves no mount, process or folder.
set -euo pipefail

store="${SLIPWAY_STORE:-$HOME/.cache/slipway}"
variant="${IMAGE##*:}"

(cd "$ROOT" && TMPDIR="$WORK" exec "$PYTHON" build.py verify --variant "$variant") >"$WORK/out" 2>"$WORK/err" &
build=$!
until grep "$WORK" /proc/mounts >/dev/null; do
    kill -0 "$build" || { tail "$WORK/err"; exit 1; }
    sleep 0.1
done
kill -TERM "$build"
code=0
wait "$build" || code=$?
[ "$code" -eq 130 ]
[ "$(tail -1 "$WORK/err")" = "build.py: interrupted; run the same command again to continue" ]
rm "$WORK/out" "$WORK/err"
[ -z "$(ls -A "$WORK")" ]
[ -z "$(find "$store/rootfs" -mindepth 1 -not -name '*.tar')" ]
if grep "$WORK" /proc/mounts; then exit 1; fi
if pgrep --full --list-full "$WORK"; then exit 1; fi
