#!/usr/bin/env bash
# What `docker save` writes becomes an OCI archive: `build.py archive` goes this way where the engine has Docker's older
# image store. The archive is the same image to the byte, the same each time, and other programs take it.
set -euo pipefail

name="slipway-test/older-store:$$"
cleanup() { docker image rm --force "$name" >"$WORK/removed" 2>&1; }
trap cleanup EXIT

printf 'FROM scratch\nCOPY one /\nCOPY two /there/\nENV SAID="a b"\nENTRYPOINT ["/one"]\n' >"$WORK/Dockerfile"
head -c 3000000 /dev/zero >"$WORK/one"
echo two >"$WORK/two"
docker build --quiet --tag "$name" "$WORK"
layers() { docker image inspect --format '{{json .RootFS.Layers}} {{json .Config.Env}} {{json .Config.Entrypoint}}' "$name"; }
layers >"$WORK/before"
docker image save --output "$WORK/saved.tar" "$name"
docker image rm --force "$name"

cat >"$WORK/repack.py" <<'PYTHON'
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from images.repack import repack

work = Path(sys.argv[2])
first, second = (repack(work / "saved.tar", work / f"{number}.tar", sys.argv[3], work) for number in "12")
assert first == second and (work / "1.tar").read_bytes() == (work / "2.tar").read_bytes()
assert (work / "1.tar").stat().st_size < 100_000, "the layers are compressed"
PYTHON
"$PYTHON" "$WORK/repack.py" "$ROOT" "$WORK" "$name"

docker image load --input "$WORK/1.tar"
layers | diff "$WORK/before" -
