#!/usr/bin/env bash
# After one changed line in Transformer Engine's binding, a build takes minutes: the rest comes from ccache.
set -euo pipefail

(cd "$ROOT" && "$PYTHON" - "$WORK/te" <<'PYTHON'
import shutil, sys
from images import manifest, sources

wanted = manifest.sources(manifest.read_manifest("gpt_oss"), "index")
shutil.copytree(sources.trees(wanted, "index", {})["transformer-engine"], sys.argv[1], symlinks=True)
PYTHON
)
wheels() { # FOLDER
    local started=$SECONDS
    (cd "$ROOT" && "$PYTHON" build.py wheels --variant index --context "te-source=$WORK/te" --out "$1") >"$WORK/log" 2>&1 ||
        { tail "$WORK/log"; return 1; }
    took=$((SECONDS - started))
}
echo '// once' >>"$WORK/te/csrc/common.cpp"
wheels "$WORK/first"
echo "before: $took s"
echo "// changed at $(date +%s%N)" >>"$WORK/te/csrc/common.cpp"
wheels "$WORK/second"
echo "a changed line: $took s"
[ "$took" -le 180 ]
