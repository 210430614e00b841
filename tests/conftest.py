"""What tests share: the command as a person runs it, and tiny models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import entrypoints
from entrypoints.families import FAMILIES
from entrypoints.families.fabricate import fabricate


@pytest.fixture
def slipway():
    """Runs the command in a process of its own; returns it finished, with stdout and stderr as text."""

    def run(*words: object, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "entrypoints.cli", *map(str, words)]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, **options)

    return run


def texts() -> list[str]:
    """Real text: the package's own source."""
    return [file.read_text() for file in sorted(Path(entrypoints.__file__).parent.rglob("*.py"))]


def make_model(folder: Path, family: str = "gpt_oss", **options) -> Path:
    """A fabricated model in `folder`; options are fabricate's."""
    fabricate(folder, FAMILIES[family].tiny_config(), texts(), **{"quantized": True, **options})
    return folder


@pytest.fixture(scope="session")
def mxfp4_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny gpt-oss with MXFP4 experts; not to be written to."""
    return make_model(tmp_path_factory.mktemp("models") / "mxfp4")


@pytest.fixture(scope="session")
def nemo_model(mxfp4_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its NeMo checkpoint."""
    from entrypoints.import_ import import_

    folder = tmp_path_factory.mktemp("nemo") / "tiny"
    import_(str(mxfp4_model), str(folder))
    return folder


def write_torch_dist(weights: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A torch_dist checkpoint, as training leaves one, of the tensors under these keys."""
    from entrypoints.checkpoint import torch_dist
    from entrypoints.checkpoint.refs import TORCH_NAMES, Ref, TensorInfo

    dtypes = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}
    infos = {key: TensorInfo(tuple(tensor.shape), dtypes[tensor.dtype]) for key, tensor in tensors.items()}
    layout = torch_dist.Layout(infos, [Ref(key) for key in infos], [])
    weights.mkdir(parents=True)
    for file, size in layout.sizes.items():
        content = bytearray(size)
        for ref, (at, offset, length) in layout.places.items():
            if at == file:
                content[offset : offset + length] = torch_dist.serialize(tensors[ref.name])
        (weights / file).write_bytes(content)
    (weights / ".metadata").write_bytes(layout.metadata())
