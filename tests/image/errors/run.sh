#!/usr/bin/env bash
# What bad requests for an image get: one line with the cure, the documented exit code, no traceback.
set -euo pipefail

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
DOCKER_HOST=unix:///nonexistent.sock expect 78 'make engine' image --model gpt_oss
