#!/usr/bin/env bash
# The files removed from packages left them intact: every file in a RECORD exists and has the hash in the RECORD, and
# the image is no larger than promised.
set -euo pipefail

bytes="$(docker image inspect --format '{{.Size}}' "$IMAGE")"
echo "$bytes bytes"
case "$IMAGE" in *:cpu) [ "$bytes" -le 6000000000 ] ;; *) [ "$bytes" -le 7500000000 ] ;; esac

docker run --rm --network none "$IMAGE" python -B -c '
import base64, hashlib, pathlib
from importlib import metadata

wrong, checked = [], 0
for distribution in metadata.distributions():
    for file in distribution.files or []:
        path = pathlib.Path(file.locate())
        if not path.is_file():
            wrong.append(f"{distribution.name}: {file} is missing")
        elif path.suffix == ".pyc":
            continue  # compiled again, without file times
        elif file.hash and path.stat().st_size < 1 << 20 or path.name == "libtriton.so":
            checked += 1
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
            if digest != file.hash.value:
                wrong.append(f"{distribution.name}: {file} has another hash")
print(f"{checked} files, {len(wrong)} wrong", *wrong[:20], sep="\n")
assert checked > 20000 and not wrong
'
# Nothing that compiles CUDA or C++ code, no headers of torch, no static library but the compiler'"'"'s own.
docker run --rm "$IMAGE" bash -c '
    cd /opt/venv/lib/python3.11/site-packages
    ! command -v g++ && ! command -v nvcc && ! find . -name "*.a" -o -path ./torch/include | grep .'
