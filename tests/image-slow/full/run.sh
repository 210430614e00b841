#!/usr/bin/env bash
# The variant full without a git host. NeMo and Megatron are the real sources; small sources in the folders next to
# this file take the place of Transformer Engine and Apex. Each is a git clone with a pin in a family's manifest. The CUDA
# code is compiled for both architectures, twice to the same bytes. A repeated compile uses ccache. Extensions that
# were silently not compiled stop the build.
set -euo pipefail

here="$(dirname "$0")"
git -C "$ROOT" ls-files -z | (cd "$ROOT" && xargs -0 cp --parents -t "$WORK")
cp -r "$here/apex" "$here/transformer-engine" "$WORK"

# Fixed dates give the same commits each time, so that the store keeps one tree of each.
export GIT_AUTHOR_DATE=2000-01-01T00:00:00Z GIT_COMMITTER_DATE=2000-01-01T00:00:00Z
commit() { # FOLDER
    [ -d "$1/.git" ] || git -C "$1" init --quiet
    git -C "$1" add --all --force
    git -C "$1" -c user.name=a -c user.email=a@b commit --quiet --message one
    git -C "$1" rev-parse HEAD
}
pin() { # NAME VERSION CLONE
    printf '\n[pins.%s]\nversion = "%s"\ncommit = "%s"\nsubmodules = {}\n' "$1" "$2" "$(commit "$3")"
}
sources=()
for name in nemo megatron-core transformer-engine apex; do
    folder="$WORK/$name"
    case "$name" in nemo | megatron-core)
        # The trees that the variant cpu is built from.
        (cd "$ROOT" && "$PYTHON" - "$name" "$folder" <<'PYTHON'
import shutil, sys
from images import manifest, sources

wanted = manifest.sources(manifest.read_manifest("llama31"), "cpu")
shutil.copytree(sources.trees(wanted, "cpu", {})[sys.argv[1]], sys.argv[2], symlinks=True)
PYTHON
        ) ;;
    esac
    sources+=(--source "$name=$folder")
    pin "$name" 0.1 "$folder" >>"$WORK/images/llama31.toml"
done
build() { # WORDS...
    (cd "$WORK" && "$PYTHON" build.py "$@" --model llama31 --variant full) >"$WORK/log" 2>&1 ||
        { tail -60 "$WORK/log"; return 1; }
}

# Two builds without a cache give the same bytes.
build wheels --no-cache --out "$WORK/one" "${sources[@]}"
build wheels --no-cache --out "$WORK/two" "${sources[@]}"
ls -l "$WORK/one"
[ "$(find "$WORK/one" -type f | wc -l)" -eq 4 ]
diff -r "$WORK/one" "$WORK/two"

# Each library has the symbols that import_check.py looks for, and code for both architectures.
mkdir "$WORK/unpacked"
for wheel in "$WORK"/one/{apex,transformer}*.whl; do unzip -q -d "$WORK/unpacked" "$wheel"; done
symbols() { nm --dynamic --defined-only "$@"; }
symbols "$WORK"/unpacked/transformer_engine/libtransformer_engine.so | grep ' T nvte_cublas_gemm'
symbols "$WORK"/unpacked/transformer_engine_torch*.so | grep ' T PyInit_transformer_engine_torch'
symbols "$WORK"/unpacked/amp_C*.so | grep ' T PyInit_amp_C'
for file in "$WORK"/unpacked/amp_C*.so "$WORK"/unpacked/transformer_engine/libtransformer_engine.so; do
    for code in sm_90 sm_100; do strings "$file" | grep -c "$code" || { echo "$file has no $code"; exit 1; }; done
    if strings "$file" | grep -F "$WORK"; then exit 1; fi
done

# After one changed line, the rest comes from ccache.
build wheels --out "$WORK/cached" "${sources[@]}"
echo '// changed' >>"$WORK/apex/csrc/amp_C.cpp"
sed -i "s/$(git -C "$WORK/apex" rev-parse HEAD)/$(commit "$WORK/apex")/" "$WORK/images/llama31.toml"
started=$SECONDS
build wheels --out "$WORK/changed" "${sources[@]}"
echo "after a changed line: $((SECONDS - started)) s"

# Extensions that are missing stop the build: the given wheels have none.
mkdir "$WORK/empty"
cp "$WORK"/one/{nemo,megatron}*.whl "$WORK/empty"
if build image --context "built-wheels=$WORK/empty" >"$WORK/out"; then exit 1; fi
grep -q 'import check: no file amp_C\*.so exports PyInit_amp_C' "$WORK/log"
if docker image inspect slipway/llama31:full >/dev/null 2>&1; then exit 1; fi
