#!/usr/bin/env bash
# A source that is mounted over one in the image is what runs, in NeMo and in ours, although bytecode is there. The image
# still starts without compiling anything: no bytecode is stale.
set -euo pipefail

site=/opt/venv/lib/python3.11/site-packages
for module in nemo.package_info slipway.errors megatron.core.package_info; do
    file="$(docker run --rm "$IMAGE" python -W ignore -c "import importlib.util as u; print(u.find_spec('$module').origin)")"
    docker run --rm "$IMAGE" cat "$file" >"$WORK/patched.py"
    # The same size and the same time as before: bytecode that is checked by those would run too.
    echo 'MOUNTED = True' >>"$WORK/patched.py"
    chmod 644 "$WORK/patched.py"
    touch --date=@0 "$WORK/patched.py"
    docker run --rm --network none --read-only --tmpfs /tmp --volume "$WORK/patched.py:$file:ro" "$IMAGE" \
        python -W ignore -c "import $module as m; assert m.MOUNTED; print('$module: patched')"
done

# Flags 0b11 in the header: bytecode that is checked by a hash of its source, as the source is.
docker run --rm "$IMAGE" python -B -c '
import pathlib, sys
from importlib.util import source_hash
wrong, checked = [], 0
for root in sys.argv[1:]:
    for file in pathlib.Path(root).rglob("*.cpython-311.pyc"):
        head = file.open("rb").read(16)
        source = file.parent.parent / (file.name.partition(".")[0] + ".py")
        checked += 1
        if head[4:8] != bytes([3, 0, 0, 0]) or source_hash(source.read_bytes()) != head[8:16]:
            wrong.append(str(file))
print(checked, "files of bytecode,", len(wrong), "wrong", *wrong[:10])
assert checked > 10000 and not wrong
' "$site" /opt/slipway
