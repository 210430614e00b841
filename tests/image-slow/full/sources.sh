# shellcheck shell=bash
# Sourced by tests of the variant full that need no git host: small_sources makes a copy of this checkout in $WORK with a
# git clone of each source, pins them for the family llama31, and fills the array `sources` with words for build.py.
#
# NeMo and Megatron are the real sources; small sources in the folders next to this file take the place of Transformer
# Engine and Apex. They have the traits of the real ones that once broke the build: a .python-version for another Python,
# a header of NVML, twelve extensions, an order of files that depends on the file system.
small="$(dirname "${BASH_SOURCE[0]}")"

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

small_sources() {
    git -C "$ROOT" ls-files -z | (cd "$ROOT" && xargs -0 cp --parents -t "$WORK")
    cp -r "$small/apex" "$small/transformer-engine" "$WORK"
    sources=()
    local name folder version
    for name in nemo megatron-core transformer-engine apex; do
        folder="$WORK/$name"
        case "$name" in
            nemo | megatron-core)
                # The trees that the variant cpu is built from.
                version="$(cd "$ROOT" && "$PYTHON" - "$name" "$folder" <<'PYTHON'
import shutil, sys
from images import manifest, sources

wanted = manifest.sources(manifest.read_manifest("llama31"), "cpu")
shutil.copytree(sources.trees(wanted, "cpu", {})[sys.argv[1]], sys.argv[2], symlinks=True)
print(next(source.version for source in wanted if source.name == sys.argv[1]))
PYTHON
                )"
                echo 3.12 >"$folder/.python-version" ;;
            transformer-engine) version=2.9.0 ;;
            apex) version=0.1 ;;
        esac
        sources+=(--source "$name=$folder")
        pin "$name" "$version" "$folder" >>"$WORK/images/llama31.toml"
    done
}

build() { # WORDS...
    (cd "$WORK" && "$PYTHON" build.py "$@" --model llama31 --variant full) >"$WORK/log" 2>&1 ||
        { tail -60 "$WORK/log"; return 1; }
}
