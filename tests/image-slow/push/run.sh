#!/usr/bin/env bash
# A registry gets the image with zstd layers, no larger than promised. The image runs when it is pulled from there.
set -euo pipefail

command -v docker-registry >/dev/null || apt-get install -y --no-install-recommends docker-registry >/dev/null 2>&1
variant="${IMAGE##*:}" model="${IMAGE#slipway/}"
model="${model%%:*}"
port="$("$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
cat >"$WORK/registry.yml" <<YAML
version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: $WORK/registry}}
http: {addr: "127.0.0.1:$port"}
YAML
docker-registry serve "$WORK/registry.yml" >"$WORK/registry.log" 2>&1 &
registry=$!
to="localhost:$port/slipway/$model:$variant"
trap 'kill "$registry" 2>/dev/null || true; docker image rm --force "$to" >/dev/null 2>&1' EXIT
until (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do sleep 0.1; done

(cd "$ROOT" && "$PYTHON" build.py push --model "$model" --variant "$variant" --to "$to") | tee "$WORK/pushed"
"$PYTHON" - "$port" "$model" "$variant" <<'PYTHON'
import json, sys, urllib.request

port, model, variant = sys.argv[1:]
accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
place = f"http://127.0.0.1:{port}/v2/slipway/{model}/manifests/{variant}"
manifest = json.load(urllib.request.urlopen(urllib.request.Request(place, headers=accept)))
total = sum(layer["size"] for layer in manifest["layers"])
print(f"{total} bytes in {len(manifest['layers'])} layers")
assert {layer["mediaType"].rpartition("+")[2] for layer in manifest["layers"]} == {"zstd"} and total <= 4_000_000_000

# Provenance and SBOM are attached. This registry keeps no list of referrers, so the list is under a tag.
request = urllib.request.Request(place, headers=accept, method="HEAD")
digest = urllib.request.urlopen(request).headers["Docker-Content-Digest"]
listed = urllib.request.Request(place.rpartition("/")[0] + "/" + digest.replace(":", "-"),
                                headers={"Accept": "application/vnd.oci.image.index.v1+json"})
kinds = {entry["artifactType"] for entry in json.load(urllib.request.urlopen(listed))["manifests"]}
assert kinds == {"application/vnd.in-toto+json", "application/vnd.cyclonedx+json"}, kinds
PYTHON
docker pull --quiet "$to"
grep -q "$(docker image inspect --format '{{index .RepoDigests 0}}' "$to" | cut -d@ -f2)" "$WORK/pushed"
docker run --rm "$to" --version | grep '^slipway '

# A registry that does not answer gives one line.
kill "$registry"
wait "$registry" || true
if (cd "$ROOT" && "$PYTHON" build.py push --model "$model" --variant "$variant" --to "$to") >"$WORK/out" 2>&1; then exit 1; fi
if ! grep -q "^build.py: the build of $to failed" "$WORK/out" || grep -q Traceback "$WORK/out"; then
    tail "$WORK/out"
    exit 1
fi
