#!/usr/bin/env bash
# A wrong request for an image gives one line that says what to do, the documented exit code, and no traceback.
set -euo pipefail

built="${VARIANT/full/cpu}" # the sources of full are on git hosts, which need not answer

expect() { # CODE TEXT COMMAND...
    local code=$1 text=$2 got=0
    shift 2
    (cd "$ROOT" && "$PYTHON" build.py "$@") >"$WORK/out" 2>"$WORK/err" || got=$?
    if [ "$got" -ne "$code" ] || ! grep -q "$text" "$WORK/err" || grep -q Traceback "$WORK/err"; then
        echo "expected $code and '$text', got $got:"
        cat "$WORK/err"
        return 1
    fi
    [ "$(wc -l <"$WORK/err")" -eq 1 ]
}

expect 2 'did you mean gpt_oss' image --model gpt_os
expect 2 'VARIANT' image --variant tiny
DOCKER_HOST=unix:///nonexistent.sock expect 78 'make engine' image --model gpt_oss --variant "$built"

# A build that is stopped leaves no incomplete image, no container and no staging folder, and says so in one line.
git -C "$ROOT" ls-files -z | (cd "$ROOT" && xargs -0 cp --parents -t "$WORK")
echo "# changed at $(date +%s%N)" >>"$WORK/entrypoints/slipway/cli.py"
things() { docker ps --all --quiet; docker image inspect --format '{{.Id}}' "slipway/qwen25:$built" 2>/dev/null || echo none; }
things >"$WORK/before"
(cd "$WORK" && exec "$PYTHON" build.py image --model qwen25 --variant "$built") >"$WORK/out" 2>"$WORK/err" &
build=$!
until grep -q '\[commands 1/2\] RUN' "$WORK/err"; do
    kill -0 "$build" || { tail "$WORK/err"; exit 1; }
    sleep 0.1
done
kill -TERM "$build"
code=0
wait "$build" || code=$?
[ "$code" -eq 130 ]
[ "$(tail -1 "$WORK/err")" = "build.py: interrupted; run the same command again to continue" ]
if grep -q Traceback "$WORK/err"; then exit 1; fi
store="${SLIPWAY_STORE:-$HOME/.cache/slipway}"
[ -z "$(find "$store" -maxdepth 1 -name "staging-$build-*")" ]
things | diff "$WORK/before" -
