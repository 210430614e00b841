"""A Slurm of its own on this machine: a login node and three nodes in network namespaces, from Debian's packages.

Every daemon has its own network, host name and hosts file, so that a node can be lost and a network cut. The bridge is
in the login node's namespace: a Docker engine on the machine drops what crosses bridges in the machine's own. Names and
addresses are a bed's own, so that several can be there at once. Needs root.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NODES = ("n1", "n2", "n3")
PACKAGES = ("slurm-wlm", "munge", "openssh-server", "iproute2")
PROGRAMS = (
    "/usr/sbin/slurmctld",
    "/usr/sbin/slurmd",
    "/usr/sbin/munged",
    "/usr/sbin/sshd",
    "/usr/sbin/ip",
    "/usr/bin/ssh",
)
LIMIT = 900.0  # seconds that anything may take: a safety net, many times what it takes on a busy machine
FOLDERS = Path(tempfile.gettempdir())  # short: a path of a socket has 107 characters at most
PREFIX = "slbed-"

CONF = """
ClusterName={id}
SlurmctldHost=login
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
KillWait=10
SlurmdTimeout={slurmd_timeout}
SlurmctldTimeout=30
InactiveLimit=0
MessageTimeout=20
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-3] Gres=gpu:2 CPUs=2 RealMemory=6000 State=UNKNOWN
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
SSHD = """
Port 22
HostKey {folder}/ssh/host
AuthorizedKeysFile {folder}/ssh/user.pub
PidFile {folder}/sshd.pid
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
SetEnv SLURM_CONF={folder}/slurm.conf PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
MaxStartups 100
MaxSessions 100
"""
SSH = """
Host login {net}.1
    HostName {net}.1
    User {user}
    IdentityFile {folder}/ssh/user
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/ssh/known
    StrictHostKeyChecking yes
Host silent
    HostName {net}.77
"""


def missing(install: bool) -> str:
    """Why there can be no bed here; empty where there can.

    Args:
        install: Debian's packages are installed where they are missing.
    """
    if os.geteuid() != 0:
        return "a Slurm needs root: it makes network namespaces"
    if not all(map(os.path.exists, PROGRAMS)):
        if not install:
            return "Slurm is not installed: `make test-slurm` installs Debian's packages"
        if why := _install():
            return why
    probe = f"{PREFIX}probe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True)
    return f"a Slurm needs network namespaces: {made.stderr.strip()}" if made.returncode else ""


def _install() -> str:
    if not shutil.which("apt-get"):
        return "a Slurm needs Debian's packages: " + " ".join(PACKAGES)
    with open(FOLDERS / f"{PREFIX}install.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        env = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update", "-q"], ["install", "-q", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", *words], env=env, capture_output=True, text=True)
        ready = all(map(os.path.exists, PROGRAMS))
    return "" if ready else f"Debian's packages cannot be installed: {done.stderr.strip()[-300:]}"


def sweep() -> None:
    """Remove the beds whose tests were killed."""
    for folder in FOLDERS.glob(f"{PREFIX}*/"):
        owner = folder / "owner"
        with contextlib.suppress(OSError, ValueError):
            if not os.path.exists(f"/proc/{int(owner.read_text())}"):
                Bed.remains_of(folder)


class Bed:
    """A Slurm that is up as long as the context lasts.

    Args:
        user: an ordinary one who submits; root where False.
        slurmd_timeout: seconds after which Slurm itself takes a node for lost.
    """

    def __init__(self, user: bool = True, slurmd_timeout: int = 20) -> None:
        self.slurmd_timeout = slurmd_timeout
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=FOLDERS))
        self.folder.chmod(0o755)
        (self.folder / "owner").write_text(str(os.getpid()))
        self.id = f"sl{secrets.token_hex(3)}"
        (self.folder / "id").write_text(self.id)
        self.user = self.id if user else "root"
        self.shared = self.folder / "shared"
        self._waiting: dict[str, float] = {}  # jobs that were queued again, and when that was seen

    # ------------------------------------------------------------------ up and down

    def __enter__(self) -> Bed:
        try:
            self._up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def _up(self) -> None:
        for name in ("munge", "state", "ssh", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True, mode=0o755)
        if self.user != "root":
            # sshd refuses an account that is locked; with * nobody can log in by password.
            _do(
                "useradd", "--no-create-home", "--home-dir", self.shared, "--shell=/bin/bash", "--password=*", self.user
            )
        self.shared.mkdir(mode=0o755)
        shutil.chown(self.shared, self.user)
        self._network()
        self._files()
        _do("munged", *self._munge("key-file", "socket", "pid-file", "log-file", "seed-file"), "--force")
        self.start("slurmctld")
        for node in NODES:
            self.start(node)
        self.wait_for_nodes()

    def _munge(self, *names: str) -> list[str]:
        return [f"--{name}={self.folder}/munge/{name.removesuffix('-file')}" for name in names]

    def _network(self) -> None:
        """A bridge in the login node's namespace; the machine and the nodes are at its ports."""
        taken = subprocess.run(["ip", "-o", "addr"], capture_output=True, text=True).stdout
        while True:
            self.net = f"10.{64 + secrets.randbelow(60)}.{secrets.randbelow(250)}"
            if f" {self.net}." not in taken:
                break
        for name in ("login", *NODES):
            _do("ip", "netns", "add", self.space(name))
            _ip(self.space(name), "link", "set", "lo", "up")
        login = self.space("login")
        _ip(login, "link", "add", "bridge", "type", "bridge")
        _ip(login, "addr", "add", f"{self.net}.1/24", "dev", "bridge")
        _ip(login, "link", "set", "bridge", "up")
        _do("ip", "link", "add", self.id, "type", "veth", "peer", "name", "client", "netns", login)
        _do("ip", "addr", "add", f"{self.net}.254/24", "dev", self.id)
        _do("ip", "link", "set", self.id, "up")
        _ip(login, "link", "set", "client", "master", "bridge", "up")
        for number, node in enumerate(NODES, 11):
            space = self.space(node)
            _ip(space, "link", "add", "eth0", "type", "veth", "peer", "name", node, "netns", login)
            _ip(login, "link", "set", node, "master", "bridge", "up")
            _ip(space, "addr", "add", f"{self.net}.{number}/24", "dev", "eth0")
            _ip(space, "link", "set", "eth0", "up")

    def _files(self) -> None:
        values = {"folder": self.folder, "id": self.id, "net": self.net, "user": self.user,
                  "slurmd_timeout": self.slurmd_timeout}  # fmt: skip
        for name, text in (("slurm.conf", CONF), ("ssh/sshd", SSHD), ("ssh/config", SSH)):
            (self.folder / name).write_text(text.format(**values))
        # GPUs that are none: devices that every machine has.
        (self.folder / "gres.conf").write_text("NodeName=n[1-3] Name=gpu File=/dev/tty[1-2]\n")
        hosts = ["127.0.0.1 localhost", f"{self.net}.1 login"]
        hosts += [f"{self.net}.{number} {node}" for number, node in enumerate(NODES, 11)]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for name in ("host", "user"):
            _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "ssh" / name)
        public = (self.folder / "ssh" / "host.pub").read_text()
        (self.folder / "ssh" / "known").write_text(f"{self.net}.1 {public}")
        (self.folder / "bin").mkdir()
        # A person's own configuration of ssh, which no test may touch.
        ssh = self.folder / "bin" / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.folder}/ssh/config "$@"\n')
        ssh.chmod(0o755)

    def down(self) -> None:
        """Remove everything, whatever state it is in."""
        self.remains_of(self.folder)

    @staticmethod
    def remains_of(folder: Path) -> None:
        """Remove a bed of which only its folder is known."""
        name = (folder / "id").read_text() if (folder / "id").exists() else ""
        for _ in range(3):  # what is killed may just be starting something
            for space in (f"{name}-{node}" for node in ("login", *NODES)):
                found = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout
                for pid in map(int, found.split()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(OSError, ValueError):
            os.kill(int((folder / "munge" / "pid").read_text()), signal.SIGKILL)
        for space in (f"{name}-{node}" for node in ("login", *NODES)):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        if name:
            subprocess.run(["ip", "link", "del", name], capture_output=True)
            with contextlib.suppress(KeyError):
                pwd.getpwnam(name)
                subprocess.run(["userdel", name], capture_output=True)
        for _ in range(20):  # a mount of a process that is about to end
            shutil.rmtree(folder, ignore_errors=True)
            if not folder.exists():
                return
            time.sleep(0.1)

    # ------------------------------------------------------------------ daemons

    def space(self, name: str) -> str:
        """The network namespace of a node."""
        return f"{self.id}-{name}"

    def inside(self, name: str, *words: object) -> list[str]:
        """The command as a process of a node: its network, host name and hosts file."""
        prepare = f'mount --bind {self.folder}/hosts /etc/hosts; hostname {name}; exec "$@"'
        enter = [
            "nsenter",
            f"--net=/run/netns/{self.space(name)}",
            "unshare",
            "--uts",
            "--mount",
            "sh",
            "-c",
            prepare,
            "sh",
        ]
        return [*enter, *map(str, words)]

    @property
    def env(self) -> dict[str, str]:
        """The variables of a process of the cluster."""
        return {"PATH": os.environ["PATH"], "SLURM_CONF": f"{self.folder}/slurm.conf", "LANG": "C.UTF-8"}

    def start(self, name: str) -> None:
        """Start the daemons of a node, or `slurmctld` and sshd of the login node."""
        if name == "slurmctld":
            _do(*self.inside("login", "slurmctld"), env=self.env)
            self.wait(lambda: "UP" in self.out("scontrol", "ping", user="root"), "slurmctld")
            # Else one that was killed asks the nodes after two minutes.
            self.run("scontrol", "reconfigure", user="root")
            if not self.processes("login", "sshd"):
                os.makedirs("/run/sshd", exist_ok=True)
                _do(*self.inside("login", "/usr/sbin/sshd", "-f", self.folder / "ssh" / "sshd"), env=self.env)
        else:
            _do(*self.inside(name, "slurmd", "-N", name, "-d", "/usr/sbin/slurmstepd"), env=self.env)

    def processes(self, name: str, program: str = "") -> list[int]:
        """The processes of a node; `program`: those alone that have this name."""
        found = subprocess.run(["ip", "netns", "pids", self.space(name)], capture_output=True, text=True).stdout
        pids = [int(pid) for pid in found.split()]
        return [pid for pid in pids if not program or _name_of(pid) == program]

    def kill(self, name: str, program: str = "", number: int = signal.SIGKILL) -> None:
        """Send a signal to the processes of a node."""
        for pid in self.processes(name, program):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def lose(self, node: str) -> None:
        """A node vanishes: its power has failed."""
        self.cut(node)
        self.kill(node)

    def cut(self, node: str) -> None:
        """A node is alive, but cannot be reached: its cable is out, at the other end."""
        _ip(self.space("login"), "link", "set", node, "down")

    def join(self, node: str) -> None:
        """The network of a node works again."""
        _ip(self.space("login"), "link", "set", node, "up")

    def back(self, node: str) -> None:
        """A lost node comes back."""
        self.join(node)
        self.start(node)

    # ------------------------------------------------------------------ asking

    def run(self, *words: object, user: str | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node as the bed's user."""
        account = pwd.getpwnam(user or self.user)
        as_user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        env = self.env | {"HOME": account.pw_dir, "USER": account.pw_name}
        options = {"env": env, "capture_output": True, "text": True, "timeout": LIMIT, "cwd": self.shared} | options
        return subprocess.run([*self.inside("login", *as_user), *map(str, words)], **options)

    def out(self, *words: object, **options: Any) -> str:
        """What such a command prints; of both streams, so that a message of an error is seen."""
        done = self.run(*words, **options)
        return (done.stdout + done.stderr).strip()

    def job(self, job: str) -> dict[str, str]:
        """The fields of `scontrol show job`; empty where Slurm has forgotten it."""
        words = self.out("scontrol", "-o", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def hurry(self) -> None:
        """A job that was queued again waits for two minutes: let it start after three seconds.

        In the second in which a node has ended the last start it refuses the next one.

        Where a controller that was killed has forgotten a start, Slurm cannot start the job again on the same node, and
        takes that out of service: a person releases the job, as `status` says, and an administrator puts the node back.
        """
        for job in self.out("squeue", "-h", "-t", "PD", "-o", "%i %r").splitlines():
            if job.endswith("BeginTime") and self._has_waited(job):
                self.run("scontrol", "update", f"JobId={job.split()[0]}", "StartTime=now", user="root")
            if job.endswith("launch failed requeued held"):
                self.put_back()
                self.run("scontrol", "release", job.split()[0])

    def _has_waited(self, job: str) -> bool:
        """It was seen to wait three seconds ago; the next time it is new again."""
        if time.monotonic() - self._waiting.setdefault(job, time.monotonic()) < 3:
            return False
        del self._waiting[job]
        return True

    def put_back(self) -> None:
        """The nodes that Slurm has taken out of service are put back."""
        for node in {*self.out("sinfo", "-h", "-N", "-t", "drain", "-o", "%N").split()} & {*NODES}:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", user="root")

    def wait(
        self, until: Callable[[], Any], what: str, limit: float = LIMIT, hurry: bool = False, pause: float = 0.2
    ) -> Any:
        """What `until` returns once it is true."""
        ends = time.monotonic() + limit
        while time.monotonic() < ends:
            if found := until():
                return found
            if hurry:
                self.hurry()
            time.sleep(pause)  # Slurm tells nobody of a change: one has to ask again
        state = self.out("squeue", "-o", "%i %j %T %r %N") + "\n" + self.out("sinfo", "-N")
        raise AssertionError(f"waited {limit:.0f} s for {what}\n{state}")

    def wait_for_nodes(self) -> None:
        """Wait until all nodes have nothing to do; each is in two partitions."""
        self.wait(lambda: self.out("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 2 * len(NODES), "idle nodes")

    @property
    def client(self) -> dict[str, str]:
        """The variables of a client that reaches the login node by ssh as `login`."""
        home = self.folder / "home"
        home.mkdir(exist_ok=True)
        return os.environ | {"HOME": str(home), "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}


def _name_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _ip(space: str, *words: object) -> None:
    _do("ip", "-n", space, *words)


def _do(*words: object, **options: Any) -> None:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=LIMIT, **options)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr or done.stdout}"


def free_ports() -> Iterator[int]:
    """Ports of this machine that nobody listens on."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            yield probe.getsockname()[1]
