#!/usr/bin/env bash
# The sources of the variant full are compiled, on small ones that have the traits of the real ones (sources.sh). The log
# says how far each stage is. Apex's extensions are installed into the image and pass its own import check.
set -euo pipefail

# shellcheck source=/dev/null
source "$ROOT/tests/image-slow/full/sources.sh"
sources=()
small_sources
build wheels --architecture 9.0 --out "$WORK/wheels" "${sources[@]}"
ls "$WORK/wheels"
[ "$(find "$WORK/wheels" -name '*.whl' | wc -l)" -eq 4 ]

cp "$WORK/images/import_check.py" "$WORK/wheels"
docker run --rm --user 0 --network none --volume "$WORK/wheels:/wheels:ro" "$IMAGE" bash -c '
    set -e
    uv pip install --quiet --offline --no-cache --no-deps /wheels/apex-*.whl
    cd /wheels
    python -B -W ignore -c "
import import_check
assert len(import_check.APEX) == 12 and import_check.import_errors(import_check.APEX) == []
print(\"twelve extensions\")"' | grep 'twelve extensions'
