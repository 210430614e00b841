#!/usr/bin/env bash
# The whole flow runs as any user with a read-only root, a tmpfs for /tmp and no network.
set -euo pipefail

docker run --rm --network none --read-only --tmpfs /tmp --user 4242:4343 --volume "$WORK:/out" "$IMAGE" \
    demo --out /out/demo --json >"$WORK/result.json"
python3 - "$WORK" <<'PYTHON'
import json, sys

result = json.load(open(f"{sys.argv[1]}/result.json"))
assert len(result["checks"]) == 8 and all(check["passed"] for check in result["checks"]), result["checks"]
assert open(f"{sys.argv[1]}/demo/run/loss.png", "rb").read(8) == b"\x89PNG\r\n\x1a\n"
PYTHON
