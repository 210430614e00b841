#!/usr/bin/env bash
# No setuid program, no tunables in the environment, no credentials in history or files, nothing of the build left.
set -euo pipefail

[ -z "$(docker run --rm --user 0 "$IMAGE" find / -xdev -perm /6000 -type f)" ]

docker inspect --format '{{json .Config.Env}}' "$IMAGE" >"$WORK/env"
if grep -E 'HF_|NCCL_|WANDB|MASTER_|TOKEN|PASSWORD|SECRET' "$WORK/env"; then exit 1; fi
docker history --no-trunc "$IMAGE" >"$WORK/history"
if grep -iE 'token=|password=|secret=|://[^/ ]*:[^/ ]*@' "$WORK/history"; then exit 1; fi
docker run --rm --user 0 "$IMAGE" bash -c '
    ! find / -xdev \( -name .netrc -o -name .pypirc -o -name pip.conf -o -name uv.toml -o -name "id_rsa*" \) | grep . &&
    ! command -v g++ && ! command -v nvcc && ! ls -d /wheels/?* /tools/?* /built/?* 2>/dev/null'
