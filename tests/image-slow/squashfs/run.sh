#!/usr/bin/env bash
# The squashfs holds the image's files and those that enroot reads: the start script, the environment, the mounts.
set -euo pipefail

variant="${IMAGE##*:}" model="${IMAGE#slipway/}"
(cd "$ROOT" && "$PYTHON" build.py sqsh --model "${model%%:*}" --variant "$variant" --out "$WORK/image.sqsh")
unsquashfs -l "$WORK/image.sqsh" >"$WORK/tree"
for path in etc/rc etc/environment etc/fstab usr/local/bin/train usr/local/bin/slipway-entrypoint usr/bin/tini \
    opt/slipway/entrypoints/slipway/cli.py opt/venv/bin/python; do
    grep -qx "squashfs-root/$path" "$WORK/tree" || { echo "no $path"; exit 1; }
done
unsquashfs -cat "$WORK/image.sqsh" etc/rc | tee "$WORK/rc" | bash -n
grep -q 'exec /usr/bin/tini -- /usr/local/bin/slipway-entrypoint "$@"' "$WORK/rc"
unsquashfs -cat "$WORK/image.sqsh" etc/environment | grep '^PATH=/opt/venv/bin'

# An ordinary user unpacks it, as every step under pyxis does: devices are for root alone to make.
install -d -o 65534 -g 65534 "$WORK/user"
setpriv --reuid=65534 --regid=65534 --clear-groups unsquashfs -no-progress -d "$WORK/user/root" "$WORK/image.sqsh" >"$WORK/said"

# Mounted, it runs a command as pyxis does: found on PATH, without the entrypoint.
mkdir "$WORK/root"
mount -o loop,ro "$WORK/image.sqsh" "$WORK/root"
trap 'umount "$WORK/root"' EXIT
chroot --userspec=65534:65534 "$WORK/root" /bin/bash -lc 'train --help' | grep 'slipway train'
