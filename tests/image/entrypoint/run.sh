#!/usr/bin/env bash
# Any command runs. Flags without a command go to slipway. Exit codes are passed on. Help takes half a second at most.
set -euo pipefail

[ "$(docker run --rm "$IMAGE" bash -c 'echo hello')" = hello ]
docker run --rm "$IMAGE" --help | grep 'Usage: slipway COMMAND'
docker run --rm "$IMAGE" | grep 'Usage: slipway COMMAND'
docker run --rm "$IMAGE" --version | grep '^slipway '
docker run --rm "$IMAGE" version --json | python3 -c 'import json, sys; nemo = json.load(sys.stdin)["nemo"]; assert {"archive", "commit", "context"} & nemo.keys()'

set +e
docker run --rm "$IMAGE" train --nodez 2 2>"$WORK/error"
code=$?
set -e
[ "$code" -eq 2 ]
grep -q 'unknown flag --nodez, did you mean --nodes' "$WORK/error"

milliseconds() {
    local start
    start=$(date +%s%N)
    docker run --rm "$IMAGE" "$@" >/dev/null
    echo $((($(date +%s%N) - start) / 1000000))
}
best() { for _ in 1 2 3 4 5; do milliseconds "$@"; done | sort -n | head -1; }
plain=$(best true)
help=$(best --help)
echo "true: $plain ms, --help: $help ms"
[ $((help - plain)) -le 500 ]
