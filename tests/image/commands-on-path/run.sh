#!/usr/bin/env bash
# Every command that `--help` lists is an executable on PATH, also in a login shell.
set -euo pipefail

docker run --rm "$IMAGE" --help | awk '/^  [a-z]/ {print $1}' >"$WORK/commands"
[ "$(wc -l <"$WORK/commands")" -ge 9 ]
for shell in 'bash -c' 'bash -lc' 'env -i /bin/sh -lc'; do
    # shellcheck disable=SC2086 # two words are meant
    docker run --rm --entrypoint /usr/bin/env "$IMAGE" $shell \
        'for c in '"$(tr '\n' ' ' <"$WORK/commands")"'; do command -v "$c" >/dev/null || { echo "$c"; exit 1; }; done'
done
docker run --rm --entrypoint train "$IMAGE" --help | grep 'slipway train'
