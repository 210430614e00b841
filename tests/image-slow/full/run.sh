#!/usr/bin/env bash
# The variant full on small sources (sources.sh). The CUDA code is compiled for both architectures, twice to the same
# bytes. A repeated compile uses ccache. Extensions that were silently not compiled stop the build.
set -euo pipefail

# shellcheck source=/dev/null
source "$(dirname "$0")/sources.sh"
sources=()
small_sources

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

# For the later architecture alone.
build wheels --architecture 10.0 --out "$WORK/later" "${sources[@]}"
mkdir "$WORK/later-unpacked"
for wheel in "$WORK"/later/{apex,transformer}*.whl; do unzip -q -d "$WORK/later-unpacked" "$wheel"; done
for file in "$WORK"/later-unpacked/amp_C*.so "$WORK"/later-unpacked/transformer_engine/libtransformer_engine.so; do
    strings "$file" | grep -c sm_100
    if strings "$file" | grep -F sm_90; then exit 1; fi
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
grep -q 'import check: no file amp_C\.\*\.so exports PyInit_amp_C' "$WORK/log"
if docker image inspect slipway/llama31:full >/dev/null 2>&1; then exit 1; fi
