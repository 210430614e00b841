#!/usr/bin/env bash
# PID 1 forwards SIGTERM to the command, reaps orphans, and passes on the exit code.
set -euo pipefail

name="slipway-signals-$$"
trap 'docker rm --force "$name" >/dev/null 2>&1' EXIT

docker run --detach --name "$name" "$IMAGE" bash -c 'trap "exit 75" TERM; while :; do sleep 0.1; done' >/dev/null
[ "$(docker exec "$name" cat /proc/1/comm)" = tini ]
# A process whose parent has ended becomes a child of PID 1. If PID 1 did not reap it, it would stay in /proc.
orphan="$(docker exec "$name" bash -c '(sleep 0.2 >/dev/null 2>&1 & echo $!)')"
docker exec "$name" bash -c 'for _ in {1..100}; do [ -e "/proc/$1" ] || exit 0; sleep 0.1; done; exit 1' - "$orphan"

docker stop --time 20 "$name" >/dev/null
[ "$(docker inspect --format '{{.State.ExitCode}}' "$name")" -eq 75 ]
