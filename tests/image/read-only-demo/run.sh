#!/usr/bin/env bash
# The whole flow: any user, a root that cannot be written, a tmpfs for /tmp, no network. Its checks can fail.
set -euo pipefail

docker run --rm --network none --read-only --tmpfs /tmp --user 4242:4343 --volume "$WORK:/out" "$IMAGE" \
    demo --out /out/demo --json >"$WORK/result.json"
python3 - "$WORK" <<'PYTHON'
import json, sys

result = json.load(open(f"{sys.argv[1]}/result.json"))
assert len(result["checks"]) == 8 and all(check["passed"] for check in result["checks"]), result["checks"]
assert open(f"{sys.argv[1]}/demo/run/loss.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
PYTHON
