#!/usr/bin/env bash
# No setuid program, no settings of users in the environment, no credentials in history or files, no build tools.
set -euo pipefail

[ -z "$(docker run --rm --user 0 "$IMAGE" find / -xdev -perm /6000 -type f)" ]

docker inspect --format '{{json .Config.Env}}' "$IMAGE" >"$WORK/env"
if grep -E 'HF_|NCCL_|WANDB|MASTER_|TOKEN|PASSWORD|SECRET' "$WORK/env"; then exit 1; fi
docker history --no-trunc "$IMAGE" >"$WORK/history"
if grep -iE 'token=|password=|secret=|://[^/ ]*:[^/ ]*@' "$WORK/history"; then exit 1; fi
docker run --rm --user 0 "$IMAGE" bash -c '
    ! find / -xdev \( -name .netrc -o -name .pypirc -o -name pip.conf -o -name uv.toml -o -name "id_rsa*" \) | grep . &&
    ! command -v g++ && ! command -v nvcc && ! ls -d /wheels/?* /tools/?* /built/?* 2>/dev/null'

# Scan every file of every layer, also files that a later layer hides. The logins of this machine's package index and
# Debian mirror are looked for too.
logins="$(cd "$ROOT" && "$PYTHON" -c '
import urllib.parse
from images import debian, store
for address in (store.index_address(), debian.mirror()):
    parts = urllib.parse.urlsplit(address)
    print(parts.username or "", parts.password or "")
')"
# shellcheck disable=SC2086 # each login is a word
docker save "$IMAGE" | "$PYTHON" "$ROOT/tests/image/no-secrets/scan.py" $logins

# The scan can find something: a token that a later layer hides.
printf 'ghp_%036d' 0 >"$WORK/token"
: >"$WORK/nothing"
printf 'FROM scratch\nCOPY token /token\nCOPY nothing /token\n' >"$WORK/Dockerfile"
docker build --quiet --tag "slipway-token-$$" "$WORK"
trap 'docker image rm --force "slipway-token-$$" >/dev/null' EXIT
docker save "slipway-token-$$" | "$PYTHON" "$ROOT/tests/image/no-secrets/scan.py" >"$WORK/found" && exit 1
grep -q 'a GitHub token' "$WORK/found"
