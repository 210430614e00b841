#!/usr/bin/env bash
# The labels, the files in the image and the files in the store say what the image is made of, and they agree.
set -euo pipefail

name="${IMAGE#slipway/}"
model="${name%%:*}"
docker image inspect --format '{{json .Config.Labels}}' "$IMAGE" >"$WORK/labels.json"
docker image inspect --format '{{.Id}}' "$IMAGE" >"$WORK/digest"
docker run --rm "$IMAGE" cat /opt/slipway/sbom.cdx.json >"$WORK/sbom.json"
docker run --rm "$IMAGE" cat /opt/slipway/pins.json >"$WORK/pins.json"
docker run --rm "$IMAGE" version --json >"$WORK/version.json"
docker run --rm "$IMAGE" python -c '
import json
from importlib import metadata
print(json.dumps({d.name.lower().replace("_", "-").replace(".", "-"): d.version for d in metadata.distributions()}))
' >"$WORK/installed.json"
# shellcheck disable=SC2016 # ${...} is dpkg-query'"'"'s
docker run --rm "$IMAGE" dpkg-query --show --showformat '${Package} ${Version}\n' >"$WORK/debian"
# The bill does not depend on the machine that built. (full was built with clones, which the command does not know.)
[ "$VARIANT" = full ] ||
    (cd "$ROOT" && "$PYTHON" build.py sbom --model "$model" --variant "$VARIANT" --platform "$PLATFORM") | cmp - "$WORK/sbom.json"

"$PYTHON" - "$WORK" "${name/:/-}" <<'PYTHON'
import json, os, pathlib, sys

work = pathlib.Path(sys.argv[1])
labels, pins, bill, version = (json.loads((work / f"{n}.json").read_text()) for n in ("labels", "pins", "sbom", "version"))
installed = json.loads((work / "installed.json").read_text())
assert json.loads(labels["org.slipway.pins"]) == pins
assert int(labels["org.slipway.driver"]) >= 580 and labels["org.slipway.cuda"] == "13.0", labels
assert not any("buildx" in label for label in labels.values()), labels
sys.path.insert(0, os.environ["ROOT"])
from images import provenance

assert labels["org.opencontainers.image.revision"] == provenance.revision(), labels
assert labels["org.opencontainers.image.source"] == provenance.origin(), labels

# The statement of provenance names each source as it was taken, and nothing else of it.
store = pathlib.Path(os.environ.get("SLIPWAY_STORE") or pathlib.Path.home() / ".cache/slipway")
statement = json.loads((store / "images" / sys.argv[2] / "provenance.json").read_text())
assert "sha256:" + statement["subject"][0]["digest"]["sha256"] == (work / "digest").read_text().strip()
taken = {d["name"]: d for d in statement["predicate"]["buildDefinition"]["resolvedDependencies"]}
distributions = {"nemo": "nemo-toolkit", "transformer-engine": "transformer-engine"}
for source, stated in pins.items():
    if source.endswith(".lock"):
        assert list(taken[source if source == "uv.lock" else f"images/{source}"]["digest"]) == ["sha256"]
        continue
    first, *rest = stated.split()
    kind = "context" if first == "context" else "commit" if len(rest) == 1 else "archive"
    assert kind in version[source], (source, stated, version[source])
    assert list(taken[source].get("digest", {})) == {"commit": ["gitCommit"], "archive": ["sha256"], "context": []}[kind]
    # What a pin says is what is installed.
    assert kind == "context" or installed[distributions.get(source, source)] == first, (source, stated)

# Everything that is installed is listed, and everything that is listed is installed, but for the two programs.
listed = {(c["purl"].partition("/")[0], c["name"], c["version"]) for c in bill["components"]}
python = {(name, version) for kind, name, version in listed if kind in ("pkg:pypi", "pkg:github", "pkg:generic")}
contexts = {name for name, version in python if version == "unknown"}
python = {(name, installed[name] if name in contexts else version) for name, version in python
          if name not in ("uv", "slipway")}
assert len(installed) > 150 and python == set(installed.items()), python ^ set(installed.items())
debian = {tuple(line.split()) for line in (work / "debian").read_text().splitlines()}
in_bill = {(name, version) for kind, name, version in listed if kind == "pkg:deb"}
assert len(debian) > 80 and in_bill == debian, in_bill ^ debian
PYTHON

# Every file of the image belongs to a Debian package or to a distribution, or is named here with what makes it.
docker run --rm --user 0 "$IMAGE" python -B -c '
import csv, pathlib, re, subprocess, sys

site = pathlib.Path("/opt/venv/lib/python3.11/site-packages")
known = set()
for file in pathlib.Path("/var/lib/dpkg/info").glob("*.list"):
    known.update(file.read_text().splitlines())
    known.update(str(pathlib.Path("/usr") / line[1:]) for line in file.read_text().splitlines())
for record in site.glob("*.dist-info/RECORD"):
    with record.open(newline="") as file:
        known.update(str((site / row[0]).resolve()) for row in csv.reader(file))
ours = {
    r"/opt/slipway/.*|/usr/local/bin/.*|.*/slipway\.pth": "Slipway",
    r".*/__pycache__/.*\.pyc": "bytecode of a known source",
    r"/opt/venv/(bin/.*|pyvenv\.cfg|\.gitignore|\.lock|CACHEDIR\.TAG|lib64)|.*/_virtualenv\.(py|pth)": "uv venv",
    r"/var/lib/((dpkg|apt|python|ucf|pam|systemd|misc)/.*|shells\.state)": "databases of dpkg and its scripts",
    r"/etc/(alternatives/.*|ld\.so\.cache|ld\.so\.conf\.d/cuda\.conf|passwd-?|group-?|shadow-?|gshadow-?|subuid-?|subgid-?)": "scripts of packages",
    r"/etc/(hostname|hosts|resolv\.conf|mtab|localtime|timezone|environment|\.pwd\.lock|shells|nsswitch\.conf|profile|motd|machine-id|networks|inputrc|fstab|python3/debian_config|apt/.*|dpkg/.*)": "scripts of packages, and the engine",
    r"/etc/(ca-certificates\.conf|ssl/certs/.*|pam\.d/.*|rc.\.d/.*|security/.*)": "scripts of packages",
    r"/(root|etc/skel)/\..*|/usr/share/(base-files|info)/.*|/var/cache/.*|/\.dockerenv": "scripts of packages, and the engine",
}
unknown = []
for path in subprocess.run(["find", "/", "-xdev", "-type", "f"], capture_output=True, text=True).stdout.splitlines():
    if path in known or path.startswith(("/proc/", "/sys/", "/dev/")):
        continue
    if not any(re.fullmatch(pattern, path) for pattern in ours):
        unknown.append(path)
print(len(unknown), "files belong to nothing", *unknown[:40], sep="\n")
sys.exit(bool(unknown))
'
