#!/usr/bin/env bash
# The labels, the files in the image and the files in the store say what the image is made of, and they agree.
set -euo pipefail

name="${IMAGE#slipway/}"
model="${name%%:*}" variant="${name##*:}"
docker image inspect --format '{{json .Config.Labels}}' "$IMAGE" >"$WORK/labels.json"
docker image inspect --format '{{.Id}}' "$IMAGE" >"$WORK/digest"
docker run --rm "$IMAGE" cat /opt/slipway/sbom.cdx.json >"$WORK/sbom.json"
docker run --rm "$IMAGE" python -c '
import json
from importlib import metadata
print(json.dumps({d.name.lower().replace("_", "-").replace(".", "-"): d.version for d in metadata.distributions()}))
' >"$WORK/installed.json"
# shellcheck disable=SC2016 # ${...} is dpkg-query'"'"'s
docker run --rm "$IMAGE" dpkg-query --show --showformat '${Package} ${Version}\n' >"$WORK/debian"
(cd "$ROOT" && "$PYTHON" build.py sbom --model "$model" --variant "$variant") | cmp - "$WORK/sbom.json"

"$PYTHON" - "$WORK" "$ROOT" "$model-$variant" <<'PYTHON'
import json, os, pathlib, sys, tomllib

work, root = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
labels = json.loads((work / "labels.json").read_text())
pins = tomllib.loads((root / "entrypoints/slipway/pins.toml").read_text())
named = json.loads(labels["org.slipway.pins"])
assert named["nemo"] == f"{pins['nemo']['version']} {pins['nemo']['commit']}", named
assert int(labels["org.slipway.driver"]) >= 580 and labels["org.slipway.cuda"] == "13.0", labels
assert not any("buildx" in label for label in labels.values()), labels

store = pathlib.Path(os.environ.get("SLIPWAY_STORE") or pathlib.Path.home() / ".cache/slipway")
statement = json.loads((store / "images" / sys.argv[3] / "provenance.json").read_text())
digest = (work / "digest").read_text().strip()
assert "sha256:" + statement["subject"][0]["digest"]["sha256"] == digest
commits = {d["name"]: d["digest"]["gitCommit"] for d in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
assert commits["megatron-core"] == pins["megatron-core"]["commit"]

listed = {(c["purl"][:8], c["name"], c["version"]) for c in json.loads((work / "sbom.json").read_text())["components"]}
built = {(name, version) for kind, name, version in listed if kind == "pkg:gith"}
installed = json.loads((work / "installed.json").read_text())
assert len(installed) > 150
wrong = [f"{name} {version}" for name, version in installed.items()
         if ("pkg:pypi", name, version) not in listed and (name, version) not in built]
debian = dict(line.split() for line in (work / "debian").read_text().splitlines())
wrong += [f"{name} {version}" for name, version in debian.items() if ("pkg:deb/", name, version) not in listed]
assert len(debian) > 80 and not wrong, wrong
PYTHON
