#!/usr/bin/env bash
# The default user is not root. Every user, with every kind of home, with the entrypoint and without (as under pyxis), can
# use Triton, import NeMo, and start a training.
set -euo pipefail

[ "$(docker run --rm "$IMAGE" id -u)" -ne 0 ]
docker run --rm --user 4242:4343 --env HOME=/nonexistent "$IMAGE" bash -c 'touch "$HOME/file"'
# Any user may write into the working folder.
docker run --rm --user 4242:4343 "$IMAGE" touch file

# What training reads, made once.
docker run --rm --volume "$WORK:/work" "$IMAGE" python -W ignore -c '
from pathlib import Path
from slipway.families import gpt_oss
from slipway.families.fabricate import fabricate
texts = [file.read_text() for file in sorted(Path("/opt/slipway/entrypoints").rglob("*.py"))]
fabricate(Path("/work/hf"), gpt_oss.tiny_config(), texts, quantized=False)'
docker run --rm --volume "$WORK:/work" "$IMAGE" import /work/hf /work/nemo
docker run --rm --volume "$WORK:/work" "$IMAGE" \
    preprocess /opt/slipway/entrypoints /work/data.jsonl --tokenizer /work/nemo --seq-length 128
cat >"$WORK/matrix.sh" <<'SCRIPT'
set -euo pipefail
out="$(mktemp -d /tmp/run.XXXXXX)"
python -W ignore -c '
import getpass, pathlib
from triton.runtime.cache import get_cache_manager
assert getpass.getuser()
assert pathlib.Path(get_cache_manager("0" * 64).put(b"x", "x", binary=True)).exists()
(pathlib.Path.home() / ".probe").touch()'
train --model /work/nemo --data /work/data.jsonl --out "$out/run" --steps 1 --seq-length 128 \
    --micro-batch-size 2 --global-batch-size 2 --nproc-per-node 1 >"$out/log" 2>&1 || { tail -20 "$out/log"; exit 1; }
[ -e "$out/run/checkpoints" ]
SCRIPT
chmod 644 "$WORK/matrix.sh"

cell() { # USER HOME ENTRYPOINT
    local options=(--network none --read-only --tmpfs /tmp:exec --user "$1" --volume "$WORK:/work:ro")
    case "$2" in
        writable)
            # A home of its own for each cell, made before: `docker run` would make it for root.
            mkdir -m 1777 "$WORK/home-$1-$3"
            options+=(--mount "type=bind,source=$WORK/home-$1-$3,target=/myhome" --env HOME=/myhome) ;;
        read-only) options+=(--env HOME=/opt) ;;
        none) options+=(--env HOME=) ;;
    esac
    [ "$3" = entrypoint ] && docker run --rm "${options[@]}" "$IMAGE" bash /work/matrix.sh
    [ "$3" = entrypoint ] || docker run --rm "${options[@]}" --entrypoint bash "$IMAGE" /work/matrix.sh
}
# Two at a time: most of a cell is one core that imports.
export -f cell
# shellcheck disable=SC2016 # the inner shell expands
printf '%s\n' {0:0,1000:1000,4242:4343}' '{writable,read-only,none}' '{entrypoint,none} |
    xargs -P 2 -L 1 bash -c 'set -e; started=$SECONDS; cell "$@"; echo "user $1, home $2, $3: $((SECONDS - started)) s"' -
