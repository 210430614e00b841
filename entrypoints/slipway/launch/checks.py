"""What a machine needs for training, one function per check. None of them imports torch.

ok = nothing to do; warn = it will run, but slowly or only in part; unfit = a run would fail.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slipway.errors import PreflightError
from slipway.launch import network
from slipway.launch.link import Link, check_port
from slipway.launch.topology import Topology, gpus_here
from slipway.report import human_bytes

OLDEST_DRIVER = tomllib.loads((Path(__file__).parent / "drivers.toml").read_text("utf-8"))

SHARED_MEMORY = 1 << 30  # bytes of /dev/shm: NCCL and the data loaders of a node take less
NVIDIA_SMI = 60  # seconds: it waits for a GPU that has hung
HEADS_CHECKPOINT = 256 << 20  # heads with their optimizer, even for the widest models
# Share of the weights that is trained; an adapter of rank 32 on every layer is 1 to 2 % of a model.
TRAINED = {"heads": 0.0, "lora": 0.02, "sft": 1.0, "pretrain": 1.0}
# Bytes per byte of BF16 weights: the weights, and a master copy with Adam's two moments in float32.
WITH_OPTIMIZER = 7


State = Literal["ok", "warn", "unfit"]


@dataclass(frozen=True)
class Check:
    """One row: what was checked, what was found, and what to do if it is not ok."""

    what: str
    state: State
    found: str
    cure: str = ""


# ---------------------------------------------------------------------------- this machine


def gpus(processes: int, asked: int | None = None, env: Mapping[str, str] = os.environ) -> Check:
    """The GPUs that processes here can see; `asked`: how many are required."""
    listed, trouble = _nvidia_smi("name,memory.total")
    names = [line.strip() for line in listed.splitlines()]
    none = f"none; nvidia-smi: {trouble}" if trouble else "none"
    kinds = ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names)) or none
    cure = "to get GPUs: docker run --gpus all, srun --gpus-per-node, Kubernetes nvidia.com/gpu"
    if trouble and _gpu_files():  # the driver's files are there, so there is a GPU, and nothing can use it
        mend = "make nvidia-smi work: restart the machine after an update of the driver, or end what holds the GPUs"
        return Check("GPUs", "unfit", f"nvidia-smi: {trouble}", mend)
    if names and (visible := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = names[: gpus_here(env)]
        kinds = f"{kinds}, of which CUDA_VISIBLE_DEVICES={visible} leaves {len(names)}"
        cure = "correct CUDA_VISIBLE_DEVICES, or unset it"
    if asked is not None and len(names) < asked:
        return Check("GPUs", "unfit", f"{kinds}, but --gpus is {asked}", cure)
    if not names:
        return Check("GPUs", "warn", kinds, f"the CPU is for tiny models only; {cure}")
    if processes > len(names):
        found = f"{kinds}, but {processes} processes"
        return Check("GPUs", "unfit", found, "lower --nproc-per-node, or request more GPUs")
    return Check("GPUs", "ok", kinds)


def driver(proc: Path = Path("/proc/driver/nvidia/version")) -> Check:
    """Whether the driver can run the CUDA version that the installed torch was built for."""
    cuda = _cuda_of_torch()
    if cuda is None:
        return Check("driver", "warn", "torch is built without CUDA", "use the image, or install what uv.lock names")
    match = re.search(r"(\d+)\.\d+(\.\d+)?", _text_of(proc))
    if match is None:
        found = f"none; torch is built for CUDA {cuda}"
        cure = "install NVIDIA's driver on the host, if it has a GPU"
        return Check("driver", "warn", found, cure)
    major, minor = cuda.split(".")[:2]
    needed = OLDEST_DRIVER.get(major)
    found = f"{match.group()}, torch is built for CUDA {cuda}"
    if needed is None or int(match.group(1)) >= needed:
        return Check("driver", "ok", found)
    if (runs := _cuda_of_driver()) >= int(major) * 1000:
        return Check("driver", "ok", f"{found}; cuda-compat, for CUDA {runs // 1000}.{runs % 1000 // 10}, is in use")
    cure = (
        f"install driver {needed} or newer on the host; if that cannot be and the GPU is a data-centre one, install "
        f"the package cuda-compat-{major}-{minor} of CUDA's apt repository and put its folder first in LD_LIBRARY_PATH"
    )
    return Check("driver", "unfit", found, cure)


def shared_memory(processes: int, path: str = "/dev/shm") -> Check:
    """/dev/shm, through which the processes of a node exchange data; a container has 64 MB by default."""
    try:
        stat = os.statvfs(path)
        size, found = stat.f_blocks * stat.f_frsize, human_bytes(stat.f_blocks * stat.f_frsize)
    except OSError as error:
        size, found = 0, f"none ({error.strerror})"
    if size >= SHARED_MEMORY or processes == 1:
        return Check(path, "ok", found)
    state: State = "unfit" if _gpu_files() else "warn"
    cure = "docker run --shm-size=16g or --ipc=host; Kubernetes: mount an emptyDir with medium Memory there"
    return Check(path, state, f"{found} for {processes} processes", cure)


def locked_memory(infiniband: Path = Path("/sys/class/infiniband")) -> Check:
    """The limit on locked memory, which RDMA needs for every buffer that it registers."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit == resource.RLIM_INFINITY:
        return Check("locked memory", "ok", "unlimited")
    if not _entries(infiniband):
        return Check("locked memory", "ok", f"{human_bytes(limit)}; only RDMA needs more, and there is no device")
    # The capability IPC_LOCK is no cure: without root, a process of a container does not have it in effect.
    cure = (
        "set no limit: docker run --ulimit memlock=-1; Kubernetes: LimitMEMLOCK=infinity for containerd on the node; "
        "Slurm: LimitMEMLOCK=infinity for slurmd, and PropagateResourceLimitsExcept=MEMLOCK"
    )
    return Check("locked memory", "unfit", human_bytes(limit), cure)


def rdma(nodes: int, infiniband: Path = Path("/sys/class/infiniband")) -> Check:
    """InfiniBand or RoCE devices with an active port."""
    devices = _entries(infiniband)
    active = [device.name for device in devices if any("ACTIVE" in _text_of(p) for p in device.glob("ports/*/state"))]
    if active:
        return Check("RDMA", "ok", f"{len(active)} of {len(devices)} devices active: {', '.join(sorted(active))}")
    if nodes == 1:
        return Check("RDMA", "ok", "none; a single node does not need it")
    cure = (
        "NCCL will use TCP, which is slow; give the container the devices: docker run --device=/dev/infiniband, or the "
        "rdma/ resource in Kubernetes"
    )
    return Check("RDMA", "warn", f"{len(devices)} devices, none active", cure)


def verbs(nodes: int, infiniband: Path = Path("/sys/class/infiniband"), library: str = network.VERBS) -> Check:
    """Whether NCCL can use the RDMA devices: it opens a library, and the library opens files of the devices."""
    kernel, seen, files = len(_entries(infiniband)), network.verbs_devices(library), network.device_files()
    bad: State = "warn" if nodes > 1 or kernel else "ok"
    if seen is None:
        cure = "NCCL will use TCP, which is slow; use the image, or install libibverbs1 and ibverbs-providers"
        if bad == "ok":
            return Check("libibverbs", "ok", f"cannot open {library}; only RDMA needs it, and there is no device")
        return Check("libibverbs", bad, f"cannot open {library}", cure)
    found = f"sees {seen} devices"
    if seen < kernel:
        cure = "NCCL will not use the others; install ibverbs-providers, which has a driver for each kind of adapter"
        return Check("libibverbs", "warn", f"{found}, the kernel has {kernel}", cure)
    if files < kernel:
        cure = (
            "give the container the devices: docker run --device=/dev/infiniband, or the rdma/ resource in Kubernetes"
        )
        return Check("libibverbs", "warn", f"{found}, but {files} of {kernel} can be opened", cure)
    return Check("libibverbs", "ok", found)


def _cuda_of_driver() -> int:
    """The CUDA version that the driver's library serves, as 13000 for 13.0; 0 without the library.

    The library of the package cuda-compat serves a newer version than the driver in the kernel was made with.
    """
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def _nvidia_smi(query: str) -> tuple[str, str]:
    """(what it prints, why it does not); both are empty where it is not installed."""
    if not shutil.which("nvidia-smi"):
        return "", ""
    words = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {NVIDIA_SMI} s"
    except OSError as error:
        return "", str(error.strerror)
    if done.returncode == 0:
        return done.stdout, ""
    said = (done.stdout + done.stderr).strip().splitlines()  # it tells its errors on standard output
    return "", said[0] if said else f"exit code {done.returncode}"


def _gpu_files() -> list[Path]:
    return [path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]


def _cuda_of_torch() -> str | None:
    """From torch's version file, without importing torch."""
    spec = importlib.util.find_spec("torch")
    text = (Path(spec.origin).parent / "version.py").read_text() if spec and spec.origin else ""
    match = re.search(r"(?m)^cuda\b.*= '([\d.]+)'", text)
    return match.group(1) if match else None


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # it is not there, or not for this user
        return []


def _text_of(file: Path) -> str:
    """A file of the kernel; nothing where it is not there, or cannot be read: a port may be gone meanwhile."""
    try:
        return file.read_text()
    except OSError:
        return ""


# ---------------------------------------------------------------------------- the master and the disk


def master_name(topology: Topology) -> Check:
    """Whether the master's name can be resolved on this machine."""
    try:
        found = socket.getaddrinfo(topology.master_addr, topology.master_port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that no host can have
        cure = "check the spelling or give an IP address; Kubernetes: add a headless Service, set the pod's `subdomain`"
        why = getattr(error, "strerror", error)
        return Check("master's name", "unfit", f"{topology.master_addr}: {why}", cure)
    return Check("master's name", "ok", f"{topology.master_addr} is {found[0][4][0]}")


def master_ports(topology: Topology) -> Check:
    """Whether node 0 can listen on its two ports. Other nodes learn that when they connect."""
    ports = f"{topology.master_port} and {topology.master_port + 1}"
    if topology.world_size == 1:
        return Check("master's ports", "ok", "a single process does not need them")
    if topology.rank != 0:
        return Check("master's ports", "ok", f"{ports}, on node 0")
    try:
        for port in (topology.master_port, topology.master_port + 1):
            check_port(port)
    except PreflightError as error:
        cure = "stop the program that uses it, or choose another --master-port"
        return Check("master's ports", "unfit", str(error), cure)
    return Check("master's ports", "ok", f"{ports} are free")


def output_folder(folder: Path) -> Check:
    """Whether OUT, or the folder in which it would be created, is writable."""
    place = existing(folder)
    if os.path.exists(folder) and place != folder:
        return Check("output", "unfit", f"{folder} is no folder", "choose another --out, or remove this file")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"doctor")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        cure = "choose another --out, or mount this folder read-write"
        return Check("output", "unfit", f"{place}: {error.strerror}", cure)
    return Check("output", "ok", f"{place} is writable")


def free_space(folder: Path, weights: Path | None, mode: str, keep: int) -> Check:
    """Whether there is room for the checkpoints of the run: `keep` of them and the one that is being written."""
    free = shutil.disk_usage(existing(folder)).free
    if TRAINED[mode] and weights is None:
        return Check("free space", "warn", human_bytes(free), "give --model to learn how much a checkpoint needs")
    size = sum(file.stat().st_size for file in weights.rglob("*") if file.is_file()) if weights else 0
    needed = (keep + 1) * (HEADS_CHECKPOINT + TRAINED[mode] * WITH_OPTIMIZER * size)
    found = f"{human_bytes(free)}; {keep + 1} checkpoints ({mode}) need up to {human_bytes(needed)}"
    if free < needed:
        return Check("free space", "unfit", found, "free some space, choose another --out, or lower --keep")
    return Check("free space", "ok", found)


def existing(folder: Path) -> Path:
    """The folder itself, or the one in which it would be created."""
    return next(place for place in (folder, *folder.parents) if os.path.isdir(place))  # Path's raises


# ---------------------------------------------------------------------------- all nodes together


def shared_folder(folder: Path, topology: Topology, link: Link, timeout: float) -> Check:
    """Whether every node sees what the others write in OUT: each writes a file and looks for all of them."""
    place = existing(folder)
    files = [place / f".slipway-doctor-{topology.master_port}-{node}" for node in range(topology.nodes)]
    mine = files[topology.node_rank]
    try:
        mine.unlink(missing_ok=True)  # of an earlier start, or somebody's link to another file
        os.close(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        return Check("shared output", "unfit", f"{mine}: {error.strerror}", "remove it, or choose another --out")
    try:
        deadline = time.monotonic() + timeout
        while (missing := [file for file in files if not file.exists()]) and time.monotonic() < deadline:
            os.listdir(place)  # NFS remembers for a while that a file does not exist; this makes it ask the server
            time.sleep(0.2)
        link.finish()  # no node removes its file before all have looked
    finally:
        mine.unlink(missing_ok=True)
    if missing:
        unseen = ", ".join(f"node {files.index(file)}" for file in missing)
        cure = "mount the same network folder on all nodes and give it as --out"
        return Check("shared output", "unfit", f"the file that {unseen} wrote to {place} is not visible here", cure)
    return Check("shared output", "ok", f"{topology.nodes} nodes see each other's files in {place}")


def all_reduce(topology: Topology, timeout: float) -> Check:
    """One timed all-reduce over all processes that the run would have."""
    from slipway.launch import all_reduce as timed

    if topology.world_size == 1:
        return Check("all-reduce", "ok", "a single process does not need it")
    try:
        found = timed.measure(topology, timeout)
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        cure = (
            "open the firewall between the nodes; choose the network with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME; "
            "NCCL_DEBUG=INFO shows more"
        )
        return Check("all-reduce", "unfit", " ".join(str(error).split())[:300], cure)
    if network.is_tcp(found) and (devices := network.verbs_devices()):
        cure = "NCCL took TCP, which is slow; NCCL_DEBUG=INFO shows why it left the RDMA devices (NCCL_IB_HCA, links)"
        return Check("all-reduce", "warn", f"{found}; {devices} RDMA devices are there", cure)
    return Check("all-reduce", "ok", found)
