"""What tests share: the command as a person runs it, and tiny models."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: models are tiny, and the cores are taken by other tests

import hypothesis
import pytest
import torch
from arena import Arena
from forked import Commands
from slipway import errors
from slipway.families import FAMILIES
from slipway.families.fabricate import fabricate
from transformers5 import Transformers5

if TYPE_CHECKING:
    from images.manifest import Source


# The files that take longest, the longest first: with --dist loadfile a file is what a worker takes, and the last ones
# should be short. All others follow in their order.
LONGEST = [
    "training/test_nodes.py",
    "training/test_parallel.py",
    "training/test_resume.py",
    "training/test_train.py",
    "test_contributing.py",
    "test_demo.py",
    "families/test_matrix.py",
    "checkpoint/test_lora.py",
    "training/test_bench.py",
    "checkpoint/test_interrupted.py",
    "checkpoint/test_nemo_made.py",
    "training/test_nf4_base.py",
    "checkpoint/test_classic.py",
    "checkpoint/test_megatron_made.py",
    "attacks/test_attack_servers.py",
    "checkpoint/test_layouts.py",
    "cluster/test_kubernetes.py",
    "training/test_adapter.py",
    "test_preprocess.py",
    "training/test_data_in_training.py",
    "test_setup.py",
    "training/test_cpu.py",
    "training/test_low_rank.py",
    "tokens/test_windows.py",
    "checkpoint/test_locate.py",
    "training/test_repairs.py",
    "attacks/test_attack_meeting.py",
    "attacks/test_attack_tokenizers.py",
    "attacks/test_attack_secrets.py",
    "test_paths.py",
    "attacks/test_attack_fuzz.py",
    "checkpoint/test_peft.py",
    "training/test_watch.py",
    "checkpoint/test_formats.py",
    "checkpoint/test_verify.py",
    "tokens/test_reading.py",
]


# No test fails because the machine is busy.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")


def pytest_configure() -> None:
    """A new seed for attacks/test_attack_fuzz.py, unless one is given; processes of pytest-xdist inherit it."""
    os.environ.setdefault("SLIPWAY_FUZZ_SEED", str(secrets.randbelow(1 << 32)))


def pytest_report_header() -> str:
    return f"fuzz: SLIPWAY_FUZZ_SEED={os.environ['SLIPWAY_FUZZ_SEED']} gives the same spoiled inputs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: some tests wait."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture
def slipway():
    """Runs the command in a process of its own; returns it finished, with stdout and stderr as text."""

    def run(*words: object, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "slipway.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=1800, **options)

    return run


@pytest.fixture(scope="session")
def newest() -> Iterator[Transformers5]:
    """The newest major of transformers."""
    with Transformers5() as process:
        yield process


@pytest.fixture(scope="session")
def warm():
    """Runs commands that need not wait for NeMo's import; see forked.Commands."""
    with Commands() as commands:
        yield commands


@contextmanager
def seconds_of_children() -> Iterator[list[float]]:
    """Puts the processor's seconds of the commands that end in the block into the list, whatever else runs here."""
    found: list[float] = []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    yield found
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def free_port() -> int:
    """A port that is free, and the one after it too; below those that the kernel gives to other programs meanwhile."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as one, socket.socket() as next_one:
            try:
                one.bind(("", port))
                next_one.bind(("", port + 1))
            except OSError:
                continue
            return port


def texts() -> list[str]:
    """Real text: the package's own source."""
    return [file.read_text() for file in sorted(Path(errors.__file__).parent.rglob("*.py"))]


DENSE = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
YARN = {"factor": 8.0, "beta_fast": 2.0, "beta_slow": 0.5, "original_max_position_embeddings": 96, "type": "yarn"}
QWEN_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KIMI = {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "rope_theta": 50000.0, "num_nextn_predict_layers": 0}
MOONLIGHT = {**KIMI, "model_type": "deepseek_v3", "q_lora_rank": None, "rms_norm_eps": 1e-5, "rope_scaling": None}
# Every kind of model, by a name for it: (family, what its tiny config is changed by; ... takes a field out).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss_yarn": ("gpt_oss", {"rope_scaling": {**YARN, "rope_type": "yarn", "truncate": True}}),
    "llama31": ("llama31", {}),
    "llama3": ("llama31", {"rope_scaling": None, "rope_theta": 500000.0}),
    "llama31_tied": ("llama31", {"tie_word_embeddings": True}),
    "llama2": ("llama31", {"rope_scaling": None, "rope_theta": ..., "num_key_value_heads": ...}),
    "llama_linear": ("llama31", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama_yarn": ("llama31", {"rope_scaling": {**QWEN_YARN, "attention_factor": 1.3}}),
    "nemotron_nano": ("llama31", {"rope_theta": 3565775107.26, "head_dim": 32}),
    "qwen25_tied": ("qwen25", {}),
    "qwen25_yarn": ("qwen25", {"rope_scaling": QWEN_YARN}),
    "qwen3_yarn": ("qwen3", {**DENSE, "rope_scaling": {**QWEN_YARN, "attn_factor": 0.8782488562869419}}),
    "qwen3_moe_yarn": ("qwen3", {"rope_scaling": {**QWEN_YARN, "beta_fast": 16, "attention_factor": 0.9}}),
    "kimi_k2": ("deepseek_v3", KIMI),
    "moonlight": ("deepseek_v3", MOONLIGHT),
    "gpt_oss_plain_rope": ("gpt_oss", {"rope_scaling": None}),
    "qwen25_untied": ("qwen25", {"tie_word_embeddings": False}),
    "qwen3_moe": ("qwen3", {}),
    "qwen3_moe_not_normalised": ("qwen3", {"norm_topk_prob": False}),
    "qwen3_dense": ("qwen3", DENSE),
    "qwen3_dense_tied": ("qwen3", {**DENSE, "tie_word_embeddings": True}),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3_plain_rope": ("deepseek_v3", {"rope_scaling": None, "num_nextn_predict_layers": 0}),
    "deepseek_v3_one_group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}),
    "deepseek_v3_yarn": ("deepseek_v3", {"rope_scaling": YARN, "num_nextn_predict_layers": 0}),
    "deepseek_v3_mscale": (
        "deepseek_v3",
        {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}, "num_nextn_predict_layers": 0},
    ),
}


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    """config.json of a tiny model of a kind."""
    family, own = KINDS[kind]
    config = {**FAMILIES[family].tiny_config(), **own, **changes}
    return {name: value for name, value in config.items() if value is not ...}


def make_model(folder: Path, kind: str = "gpt_oss", changes: dict[str, Any] | None = None, **options) -> Path:
    """A fabricated model of a kind in `folder`; options are fabricate's."""
    fabricate(folder, config_of(kind, **changes or {}), texts(), **{"quantized": True, **options})
    return folder


@pytest.fixture(scope="session")
def mxfp4_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with MXFP4 experts; not to be written to."""
    return make_model(tmp_path_factory.mktemp("models") / "mxfp4")


@pytest.fixture(scope="session")
def nemo_model(mxfp4_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its NeMo checkpoint."""
    from slipway.commands.import_checkpoint import import_checkpoint

    folder = tmp_path_factory.mktemp("nemo") / "tiny"
    import_checkpoint(str(mxfp4_model), str(folder))
    return folder


@pytest.fixture(scope="session")
def arena() -> Iterator[Arena]:
    """Runs commands on hostile inputs, with limits; see arena.Arena."""
    with Arena() as arena:
        yield arena


@pytest.fixture
def nemo(nemo_model: Path, tmp_path: Path) -> Path:
    """A NeMo checkpoint of one's own to spoil."""
    return Path(shutil.copytree(nemo_model, tmp_path / "nemo"))


@pytest.fixture
def model(mxfp4_model: Path, tmp_path: Path) -> Path:
    """A Hugging Face model of one's own to spoil."""
    return Path(shutil.copytree(mxfp4_model, tmp_path / "model"))


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Token data for `train`."""
    file = tmp_path / "data.jsonl"
    file.write_text((json.dumps({"inputs": {"p_ids": [1, 2], "r_ids": [3, 4, 5]}}) + "\n") * 8)
    return file


def tensor_of(reader: Any, name: str) -> torch.Tensor:
    """A whole tensor, as torch's, of any reader of ours."""
    from slipway.tensors.bits import to_torch
    from slipway.tensors.refs import Ref

    return to_torch(reader.read(Ref(name)), reader.tensors[name].dtype)


def saved(tensor: torch.Tensor) -> bytes:
    """The archive that torch.save writes of a tensor alone."""
    buffer = io.BytesIO()
    torch.save(tensor.clone(memory_format=torch.contiguous_format), buffer)
    return buffer.getvalue()


def write_torch_dist(weights: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A torch_dist checkpoint by torch's own code, of the tensors under these keys, as training leaves one."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    storage, state, content = {}, {}, b""
    for key, tensor in tensors.items():
        blob, start = saved(tensor), torch.Size([0] * tensor.dim())
        chunks = [dcp.ChunkStorageMetadata(start, tensor.size())]
        properties = dcp.TensorProperties(dtype=tensor.dtype)
        state[f"module.{key}"] = dcp.TensorStorageMetadata(properties, tensor.size(), chunks)
        where = _StorageInfo("__0_0.distcp", len(content), len(blob))
        storage[dcp.MetadataIndex(f"module.{key}", start)] = where
        content += blob
    weights.mkdir(parents=True)
    (weights / "__0_0.distcp").write_bytes(content)
    (weights / ".metadata").write_bytes(pickle.dumps(dcp.Metadata(state, storage_data=storage)))


def git(folder: Path, *words: str) -> str:
    """What git prints in a folder."""
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    return subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def clone(tmp_path, monkeypatch) -> tuple[Path, Source]:
    """A folder with repositories `whole` and its submodule `part`, and the pin of the commit; the store is empty."""
    from images.manifest import Source

    monkeypatch.setenv("SLIPWAY_STORE", str(tmp_path / "store"))
    for name in ("part", "whole"):
        (tmp_path / name).mkdir()
        git(tmp_path / name, "init", "--quiet")
        (tmp_path / name / "file.txt").write_text(name)
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "--quiet", "-m", "one")
    whole = tmp_path / "whole"
    git(whole, "submodule", "add", "--quiet", str(tmp_path / "part"), "inner/part")
    git(whole, "commit", "--quiet", "-m", "two")
    commits = {name: git(tmp_path / name, "rev-parse", "HEAD").strip() for name in ("part", "whole")}
    nowhere = "https://host.invalid/part"
    submodules = {"part": {"commit": commits["part"], "repository": nowhere}}
    source = Source("whole", "whole", "1", commits["whole"], nowhere, "MIT", submodules=submodules)
    return tmp_path, source
