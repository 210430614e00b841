#!/usr/bin/env bash
# An image on top of ours, with three lines: a Python package and a Debian package go in; what would replace a package of
# ours is refused. All of it without a network: the packages are made here.
set -euo pipefail

"$PYTHON" - "$WORK" <<'PYTHON'
import pathlib, subprocess, sys, zipfile

work = pathlib.Path(sys.argv[1])
for name, needs in (("fits", "numpy"), ("breaks", "numpy>=2")):
    with zipfile.ZipFile(work / f"{name}-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "VALUE = 1\n")
        meta = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\nRequires-Dist: {needs}\n"
        wheel.writestr(f"{name}-1.dist-info/METADATA", meta)
        wheel.writestr(f"{name}-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-1.dist-info/RECORD", "")
control = work / "deb" / "DEBIAN"
control.mkdir(parents=True)
(work / "deb" / "usr" / "bin").mkdir(parents=True)
(work / "deb" / "usr" / "bin" / "added").write_text("#!/bin/sh\necho added\n")
(work / "deb" / "usr" / "bin" / "added").chmod(0o755)
fields = "Package: added\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDepends: python3\nDescription: one\n"
(control / "control").write_text(fields)
subprocess.run(["dpkg-deb", "--build", "--root-owner-group", work / "deb", work / "added_1_all.deb"], check=True, stdout=sys.stderr)
PYTHON

context="$WORK/context"
mkdir "$context"
cp "$WORK"/*.whl "$WORK"/*.deb "$context"
cat >"$context/Dockerfile" <<DOCKERFILE
FROM $IMAGE
USER root
RUN --mount=type=bind,target=/mnt uv pip install --no-cache --offline --no-index --find-links /mnt fits && apt-get install -y /mnt/added_1_all.deb
DOCKERFILE
name="slipway-on-top-$$"
trap 'docker image rm --force "$name" >/dev/null' EXIT
docker build --quiet --network none --tag "$name" "$context"
docker run --rm --user 4242:4343 "$name" python -W ignore -c '
import fits, numpy
assert numpy.__version__.startswith("1.26"), numpy.__version__'
[ "$(docker run --rm "$name" added)" = added ]
docker run --rm "$name" ps -o pid= -p 1 | grep 1
docker run --rm "$name" --version

refused() { # TEXT WORDS...
    local text=$1
    shift
    if docker run --rm --user 0 --network none --volume "$context:/mnt:ro" "$IMAGE" \
        uv pip install --no-cache --offline --no-index --find-links /mnt "$@" >"$WORK/out" 2>&1; then return 1; fi
    grep -q "$text" "$WORK/out" || { cat "$WORK/out"; return 1; }
}
refused 'numpy' breaks
refused 'numpy==1.26.4' 'numpy==2.0.0'
