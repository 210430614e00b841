"""A Docker engine: the running one, or a private one (Debian, as root).

The private engine is docker, containerd and buildx of Debian 13, which apt verifies against Debian's signatures. It is
unpacked beside the store, not in it: it runs as root, so it may not come from a folder that others have filled. It has
its own socket, data and state. An engine that is installed or running is not changed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from images import process
from images.debian import Apt, mirror
from images.store import BuildError, local
from images.target import Target, here

SUITE = "trixie"  # Debian 12's docker is too old for reproducible images; Debian 13's programs run on Debian 12
UNPACKED = ("docker.io", "docker-cli", "docker-buildx", "docker-compose", "containerd")
INSTALLED = {"iptables": "iptables", "runc": "runc", "mmdebstrap": "mmdebstrap"}  # program → Debian package
OLDEST_BUILDX = (0, 13)  # the first version that sets the times in layers
START_SECONDS = 30
LOCK_SECONDS = 600
IP_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
KEEP_CACHE = "40GB"  # of layers that later builds may use; BuildKit deletes the longest unused ones first


def home() -> Path:
    """The private engine's folder."""
    return local() / "engine"


def socket() -> Path:
    """The private engine's socket. It is not in the store: a socket's path may have 107 characters at most."""
    return Path(f"/run/slipway-{os.getuid()}/docker.sock")


def docker(*words: str, **options: Any) -> subprocess.CompletedProcess:
    """Run the docker client with the engine in use; options are those of subprocess.run."""
    return subprocess.run([client(), *words], env=environment(), **options)


def buildx(*words: str, variables: dict[str, str]) -> int:
    """Run `docker buildx` with the engine in use and return its exit status; on an interrupt wait until it ends."""
    command = [client(), "buildx", *words]
    return process.run(command, env={**environment(), **variables}, stdin=subprocess.DEVNULL).returncode


def run_client(words: list[str]) -> None:
    """Replace this process by the docker client, with the engine in use."""
    os.execve(client(), ["docker", *words], environment())


def client() -> str:
    """The docker client: the private engine's if that engine runs, else the machine's."""
    own = home() / "root" / "usr" / "bin" / "docker"
    if _uses_private() and own.exists():
        return str(own)
    return shutil.which("docker") or str(own)


def environment() -> dict[str, str]:
    """The environment variables with which `docker` connects to the engine in use."""
    if not _uses_private():
        return dict(os.environ)
    return {**os.environ, "DOCKER_HOST": f"unix://{socket()}", "DOCKER_CONFIG": str(home() / "config")}


def _uses_private() -> bool:
    return "DOCKER_HOST" not in os.environ and socket().exists()


def answers() -> bool:
    """Does an engine answer?"""
    try:
        return docker("info", capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def require() -> None:
    """BuildError unless an engine answers and its buildx is new enough."""
    if not answers():
        raise BuildError(
            "no Docker engine answers; start Docker, or run `make engine` for a private one (Debian, root)"
        )
    words = docker("buildx", "version", capture_output=True, text=True).stdout.split()
    version = next((word for word in words if word[0].isdigit() or word[:2] in ("v0", "v1")), "")
    found = tuple(int(part) for part in version.lstrip("v").split("+")[0].split(".")[:2] if part.isdigit())
    if found < OLDEST_BUILDX:
        what = f"buildx {version}" if version else "no buildx"
        raise BuildError(f"the Docker client has {what}, expected 0.13 or newer; update it, or run `make engine`")


def has_containerd_store() -> bool:
    """Does the engine keep images as BuildKit wrote them? Docker's older store unpacks layers and has no manifests."""
    words = ["info", "--format", "{{json .DriverStatus}}"]
    return "io.containerd.snapshotter" in docker(*words, capture_output=True, text=True).stdout


def require_platform(target: Target, compiles_cuda: bool) -> None:
    """BuildError unless the engine can build for a processor: its own, or one that it emulates.

    Args:
        compiles_cuda: the build compiles Transformer Engine or Apex, which takes an hour of the processor itself.
    """
    words = ["info", "--format", "{{.Architecture}}"]
    own = docker(*words, capture_output=True, text=True).stdout.strip()
    if own in ("", target.machine, target.debian):  # "": an engine that does not say
        return
    if compiles_cuda:
        raise BuildError(
            f"the engine's machine is {own}, and compiling CUDA code for {target.machine} there would take days, since "
            f"it can only emulate that processor; missing: an engine on a machine with {target.machine} (set "
            "DOCKER_HOST to it), or wheels that were built on one: there `build.py wheels --out FOLDER`, here "
            "`--context built-wheels=FOLDER`"
        )
    shown = docker("buildx", "inspect", capture_output=True, text=True).stdout
    if target.platform not in shown.replace(",", " ").replace("*", " ").split():
        raise BuildError(
            f"the engine's machine is {own} and cannot run programs of {target.machine}; missing there: an emulator "
            "(Debian, Ubuntu: qemu-user-static, then start the engine again), or an engine on a machine with "
            f"{target.machine}"
        )


def start() -> None:
    """Start the private engine, unless an engine answers already."""
    if answers():
        print("engine: a Docker engine is running", file=sys.stderr)
        return
    if os.getuid() != 0:
        raise BuildError("the private engine needs root; run as root, start Docker, or set DOCKER_HOST to an engine")
    _install()
    _keep_forwarding()
    _run_daemon()
    print(f"engine: a private engine is running at unix://{socket()}", file=sys.stderr)


def install_programs() -> None:
    """Install what the engine needs of this machine's Debian packages, if it is missing."""
    missing = [package for program, package in INSTALLED.items() if not shutil.which(program)]
    if missing:
        apt_get("install", "-y", "--no-install-recommends", *missing)


def _install() -> None:
    install_programs()
    root, stamp = home() / "root", home() / "unpacked"
    if root.exists() and stamp.exists() and stamp.read_text().split() == list(UNPACKED):
        return
    home().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home()) as scratch:
        apt = Apt(Path(scratch) / "apt", {SUITE: mirror()}, here())
        debs = Path(scratch) / "debs"
        debs.mkdir()
        apt.run("apt-get", "download", *UNPACKED, cwd=debs)
        for deb in sorted(debs.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", deb, Path(scratch) / "root"], check=True)
        plugins = home() / "config" / "cli-plugins"
        plugins.mkdir(parents=True, exist_ok=True)
        for plugin in (Path(scratch) / "root").rglob("cli-plugins/docker-*"):
            shutil.copy(plugin, plugins)
            (plugins / plugin.name).chmod(0o755)
        shutil.rmtree(root, ignore_errors=True)
        os.rename(Path(scratch) / "root", root)
    stamp.write_text(" ".join(UNPACKED))


def apt_get(*words: str) -> None:
    """Run the machine's apt-get; if it fails, update its lists, which may be old, and try once more."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Another apt, such as the daily one of a machine that has just started, holds dpkg's lock for minutes.
    waiting = f"DPkg::Lock::Timeout={LOCK_SECONDS}"
    for last in (False, True):
        done = process.run(["apt-get", "-o", waiting, *words], capture_output=True, text=True, env=environment)
        if done.returncode == 0:
            return
        if last:
            raise BuildError(f"apt-get {words[0]} failed: {done.stderr.strip().splitlines()[-1]}")
        process.run(["apt-get", "-o", waiting, "update"], capture_output=True, env=environment)


def _run_daemon() -> None:
    for folder in (home() / "data", socket().parent):
        folder.mkdir(parents=True, exist_ok=True)
    config = home() / "daemon.json"
    collector = {"enabled": True, "defaultKeepStorage": KEEP_CACHE}
    # containerd's image store keeps layers as BuildKit wrote them. Docker's older one would pack them again, with
    # other digests.
    config.write_text(json.dumps({"features": {"containerd-snapshotter": True}, "builder": {"gc": collector}}))
    binaries = home() / "root" / "usr"
    command = [
        str(binaries / "sbin" / "dockerd"),
        f"--config-file={config}",
        f"--data-root={home() / 'data'}",
        f"--exec-root={socket().parent / 'exec'}",
        f"--pidfile={_pid_file()}",
        f"--host=unix://{socket()}",
    ]
    path = f"{binaries}/sbin:{binaries}/bin:{os.environ['PATH']}"
    with (home() / "dockerd.log").open("w") as log:
        subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PATH": path},
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if socket().exists() and answers():
            return
        time.sleep(0.2)
    last = (home() / "dockerd.log").read_text().strip().splitlines()[-1:]
    raise BuildError(f"the private engine did not start: {' '.join(last)}; see {home() / 'dockerd.log'}")


def _keep_forwarding() -> None:
    """Note whether this machine forwards packets: docker changes that, for every other program too."""
    policy = subprocess.run(["iptables", "-S", "FORWARD"], capture_output=True, text=True).stdout.split("\n")[0]
    forwards = IP_FORWARD.read_text().strip() if IP_FORWARD.exists() else ""
    (home() / "forwarding").write_text(json.dumps({"policy": policy.rpartition(" ")[2], "forwards": forwards}))


def _restore_forwarding() -> None:
    """Set back what docker changed: it leaves FORWARD at DROP, and then virtual machines and routers get no packets."""
    try:
        before = json.loads((home() / "forwarding").read_text())
        if before["policy"] in ("ACCEPT", "DROP"):
            subprocess.run(["iptables", "-P", "FORWARD", before["policy"]], capture_output=True)
        if before["forwards"]:
            IP_FORWARD.write_text(before["forwards"])
    except (OSError, ValueError, KeyError):
        return


def _pid_file() -> Path:
    return socket().parent / "docker.pid"


def stop() -> None:
    """Stop the private engine if it runs; what it built is kept."""
    try:
        daemon = int(_pid_file().read_text())
    except FileNotFoundError:
        return
    try:
        os.kill(daemon, signal.SIGTERM)
        while True:
            os.kill(daemon, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        shutil.rmtree(socket().parent, ignore_errors=True)
        _restore_forwarding()
        print("engine: stopped", file=sys.stderr)
