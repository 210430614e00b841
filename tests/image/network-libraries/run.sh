#!/usr/bin/env bash
# What the container runtimes and NCCL look for: the variables that make enroot and NVIDIA's runtimes mount the driver,
# libibverbs with its drivers, and a place for the network library of a cloud.
set -euo pipefail

docker inspect --format '{{range .Config.Env}}{{println .}}{{end}}' "$IMAGE" >"$WORK/env"
grep -x 'NVIDIA_VISIBLE_DEVICES=all' "$WORK/env"
grep -x 'NVIDIA_DRIVER_CAPABILITIES=compute,utility' "$WORK/env"

run=(docker run --rm --network none --read-only --tmpfs /tmp)
"${run[@]}" "$IMAGE" python -W ignore -c '
import ctypes
from slipway.launch import network
assert network.verbs_devices() is not None
ctypes.CDLL("librdmacm.so.1")'
"${run[@]}" "$IMAGE" bash -c 'ls /usr/lib/*-linux-gnu/libibverbs/libmlx5-rdmav*.so'
set +e
"${run[@]}" "$IMAGE" doctor --json >"$WORK/doctor.json"
set -e
python3 - "$WORK/doctor.json" <<'PYTHON'
import json, sys

checks = {check["what"]: check for check in json.load(open(sys.argv[1]))["checks"]}
assert checks["libibverbs"]["found"].startswith("sees "), checks
PYTHON

# A library in a folder that is mounted where a cloud puts it.
for folder in /opt/nccl-net /opt/amazon/ofi-nccl/lib /usr/local/gib/lib64 /usr/local/nvidia/lib64; do
    "${run[@]}" --entrypoint bash --volume "$WORK:/made" "$IMAGE" -c \
        'echo "int found(void) { return 42; }" >/tmp/net.c && gcc -shared -fPIC -o /made/libnccl-net.so /tmp/net.c'
    "${run[@]}" --volume "$WORK:$folder:ro" "$IMAGE" python -c '
import ctypes
assert ctypes.CDLL("libnccl-net.so").found() == 42'
    rm -f "$WORK/libnccl-net.so"
done
