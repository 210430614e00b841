#!/usr/bin/env bash
# The default user is not root. Any UID and GID work, also without a passwd entry or a home that can be written.
set -euo pipefail

[ "$(docker run --rm "$IMAGE" id -u)" -ne 0 ]
for user in 0:0 1000:1000 4242:4343 65534:65534; do
    docker run --rm --user "$user" "$IMAGE" bash -c '
        set -e
        [ "$(id -u):$(id -g)" = "$1" ]
        touch "$HOME/file"
        python -W ignore -c "import getpass, torch; assert getpass.getuser(); torch.compile(lambda x: x)"
    ' - "$user"
done
docker run --rm --user 4242:4343 --env HOME=/nonexistent "$IMAGE" bash -c 'touch "$HOME/file"'
# Any user may write into the working folder.
docker run --rm --user 4242:4343 "$IMAGE" touch file
