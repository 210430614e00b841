#!/usr/bin/env bash
# Podman loads an archive with zstd layers and runs the whole flow as any user, with a read-only root and no network.
# The archive is no larger than promised.
set -euo pipefail

command -v podman >/dev/null || apt-get install -y --no-install-recommends podman runc >/dev/null 2>&1
variant="${IMAGE##*:}" model="${IMAGE#slipway/}"
(cd "$ROOT" && "$PYTHON" build.py archive --model "${model%%:*}" --variant "$variant" --out "$WORK/image.tar")
bytes="$(stat --format %s "$WORK/image.tar")"
echo "archive: $bytes bytes"
[ "$bytes" -le 4000000000 ]
"$PYTHON" - "$WORK" <<'PYTHON'
import json, sys, tarfile

with tarfile.open(f"{sys.argv[1]}/image.tar") as archive:
    (image,) = json.load(archive.extractfile("index.json"))["manifests"]
    manifest = json.load(archive.extractfile("blobs/sha256/" + image["digest"].removeprefix("sha256:")))
assert {layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]} == {"zstd"}, manifest
stated = json.load(open(f"{sys.argv[1]}/image.tar.provenance.json"))["subject"][0]["digest"]["sha256"]
assert image["digest"] == f"sha256:{stated}"
PYTHON

podman() { command podman --root "$WORK/storage" --runroot "$WORK/state" --cgroup-manager cgroupfs --runtime runc "$@"; }
trap 'podman system reset --force >/dev/null 2>&1 || true' EXIT
podman load --quiet --input "$WORK/image.tar"
rm "$WORK/image.tar"
name="$(podman images --format '{{.Repository}}:{{.Tag}}' | grep "slipway/")"
# Podman raises limits by default; an engine that runs in a container itself may not do that.
run=(run --rm --network none --ulimit nofile=1024:1024 --ulimit nproc=4096:4096)
podman "${run[@]}" "$name" --help | grep 'Usage: slipway COMMAND'
[ "$(podman "${run[@]}" "$name" id -u)" -eq 1000 ]
mkdir --mode=1777 "$WORK/out"
podman "${run[@]}" --read-only --tmpfs /tmp --user 4242:4343 --volume "$WORK/out:/out" "$name" \
    demo --out /out/demo --json >"$WORK/result.json"
"$PYTHON" -c '
import json, sys
checks = json.load(open(sys.argv[1]))["checks"]
assert len(checks) == 8 and all(check["passed"] for check in checks), checks' "$WORK/result.json"
