"""torch.save's archives and torch.distributed.checkpoint's metadata, against torch itself."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import saved
from slipway.checkpoint import archive, dcp
from slipway.tensors import bits
from slipway.tensors.refs import TORCH_NAMES

SHAPES = [(), (0,), (1,), (7,), (3, 5), (0, 4), (2, 3, 4, 5), (300, 1)]


def archive_of(part: bits.Bits, dtype: str) -> bytes:
    return b"".join(map(bytes, archive.write(part, dtype)))


def read(path: Path, content: bytes, shape: tuple[int, ...], start: int = 0) -> tuple[bits.Bits, str]:
    path.write_bytes(bytes(start) + content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return archive.read(descriptor, start, len(content), shape)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("dtype", archive.STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
def test_torch_loads_what_is_written_and_the_other_way_round(dtype, shape, tmp_path):
    tensor = torch.randint(0, 2, shape).to(getattr(torch, TORCH_NAMES[dtype]))
    content = archive_of(bits.from_torch(tensor), dtype)
    assert len(content) == archive.length(shape, dtype)
    loaded = torch.load(io.BytesIO(content), weights_only=True)
    assert loaded.dtype == tensor.dtype and loaded.shape == tensor.shape and torch.equal(loaded, tensor)
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        assert zipped.testzip() is None and zipped.getinfo("archive/data/0").file_size == tensor.nbytes
    part, found = read(tmp_path / "ours", content, shape)
    assert found == dtype and torch.equal(bits.to_torch(part, dtype), tensor)
    part, found = read(tmp_path / "torch's", saved(tensor), shape, start=1000)
    assert found == dtype and torch.equal(bits.to_torch(part, dtype), tensor)


def test_the_data_lies_aligned():
    content = archive_of(bits.from_torch(torch.full((4,), 7, dtype=torch.int64)), "I64")
    assert content.index(struct.pack("<4q", 7, 7, 7, 7)) % archive.ALIGNMENT == 0


def test_tensors_that_are_parts_of_larger_ones(tmp_path):
    """What torch saves of a view: the whole storage, and where in it the view lies."""
    whole = torch.arange(24.0).view(4, 6)
    for view in (whole[1:3, 2:5], whole.T, whole[::2], whole[0].expand(3, 6)):
        buffer = io.BytesIO()
        torch.save(view, buffer)
        part, _ = read(tmp_path / "file", buffer.getvalue(), tuple(view.shape))
        assert torch.equal(bits.to_torch(part, "F32"), view)


def test_transposed_parts_of_any_shape_are_put_in_order():
    """Smaller than a tile, larger, and no multiple of one."""
    for shape in ((1, 1), (3, 700), (64, 512), (200, 1025), (0, 5)):
        part = np.random.default_rng(0).integers(0, 1 << 16, shape, dtype=np.uint16)
        found = bits.contiguous(part.T)
        assert found.flags.c_contiguous and np.array_equal(found, part.T)


def test_an_object_without_tensors():
    content = {"epoch": 0, "marks": [True, None, "x"]}
    assert torch.load(io.BytesIO(archive.of_plain(content)), weights_only=True) == content


@pytest.mark.parametrize(
    "content",
    [
        # What Megatron's distributed optimizer saves on a GPU, where weights and gradients have other dtypes.
        [{(torch.bfloat16, torch.float32): [71303168]}],
        {torch.float32: [{"padding": False}], (torch.float32, torch.float32): 1},
    ],
)
def test_objects_of_the_optimizer_have_dtypes_for_keys(content, tmp_path):
    torch.save(content, tmp_path / "object")
    with (tmp_path / "object").open("rb") as file:
        archive.check_object(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def test_metadata_is_torchs_own():
    index = dcp.MetadataIndex(fqn="x", offset=dcp.size((0, 0)), index=None)
    entry = dcp.TensorStorageMetadata(
        properties=dcp.TensorProperties(dtype="BF16"),
        size=dcp.size((4, 6)),
        chunks=[dcp.ChunkStorageMetadata(offsets=dcp.size((0, 0)), sizes=dcp.size((4, 6)))],
    )
    where = dcp.StorageInfo(relative_path="f", offset=1, length=2)
    fields = {"planner_data": None, "storage_meta": None, "version": None}
    pickled = dcp.dumps(dcp.Metadata(state_dict_metadata={"x": entry}, storage_data={index: where}, **fields))

    from torch.distributed.checkpoint import metadata as torchs
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    size, start = torch.Size([4, 6]), torch.Size([0, 0])
    wanted = torchs.Metadata(
        {"x": torchs.TensorStorageMetadata(
            torchs.TensorProperties(dtype=torch.bfloat16), size, [torchs.ChunkStorageMetadata(start, size)]
        )},
        storage_data={torchs.MetadataIndex("x", start): _StorageInfo("f", 1, 2)},
    )  # fmt: skip
    assert pickle.loads(pickled) == wanted
    for text in (pickled, pickle.dumps(wanted)):
        found = dcp.loads(text)
        assert found.state_dict_metadata["x"].properties.dtype == "BF16"
        assert [at.fqn for at in found.storage_data] == ["x"] and found.state_dict_metadata["x"].size == (4, 6)


def test_a_pickle_cannot_ask_for_memory():
    """Numbers of entries in a table that is filled in order everywhere else."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in (1 << 28, (1 << 32) - 1):
        assert dcp.loads(b"\x80\x02Nr" + struct.pack("<I", number) + b".") is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_the_archives_of_one_shape_are_taken_apart_once(tmp_path, monkeypatch):
    """As torch writes them, also of a part of a tensor, which begins elsewhere in what is stored."""
    base = torch.arange(40.0)
    tensors = [torch.randn(3, 4), torch.randn(3, 4), base[1:3], base[2:4], base[1:3] + 0, base[4:6] + 0, torch.ones(())]
    content = b""
    places = []
    for tensor in tensors * 2:
        buffer = io.BytesIO()
        torch.save(tensor, buffer)
        places.append((len(content), buffer.tell()))
        content += buffer.getvalue()
    path = tmp_path / "file"
    path.write_bytes(content)
    apart = []
    taken = archive._located
    monkeypatch.setattr(archive, "_located", lambda *given: apart.append(given) or taken(*given))
    descriptor = os.open(path, os.O_RDONLY)
    layouts = archive.Layouts()
    for tensor, (start, count) in zip(tensors * 2, places, strict=True):
        found = layouts.locate(descriptor, start, count, tensor.shape)
        assert found == archive.locate(descriptor, start, count, tensor.shape)
        read = found.read(descriptor, [(0, size) for size in tensor.shape])
        assert torch.equal(bits.to_torch(read, "F32"), tensor)
        with pytest.raises(ValueError, match="not the tensor that was expected"):
            layouts.locate(descriptor, start, count, (*tensor.shape, 1))
    os.close(descriptor)
    # Two for each: with locate itself, and refused. The parts at 1 and at 2 begin alike and take turns.
    assert len(apart) - 2 * len(places) == 1 + 4 + 1 + 1


def test_an_archive_that_only_ends_like_another_is_refused_as_before(tmp_path):
    """One with the same length and shape, whose pickle or header was changed after the first was read."""
    content = saved(torch.randn(3, 4))
    other = content.replace(b"FloatStorage", b"DoubtStorage")
    path = tmp_path / "file"
    path.write_bytes(content + other)
    descriptor = os.open(path, os.O_RDONLY)
    layouts = archive.Layouts()
    layouts.locate(descriptor, 0, len(content), (3, 4))
    with pytest.raises((zipfile.BadZipFile, pickle.UnpicklingError)):
        layouts.locate(descriptor, len(content), len(content), (3, 4))
    os.close(descriptor)
