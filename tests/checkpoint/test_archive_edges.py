"""The bytes of an archive: what torch would write in the same places, nothing between, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import saved
from slipway.checkpoint import archive
from slipway.tensors import bits


def whole(part: np.ndarray, dtype: str) -> bytes:
    return b"".join(map(bytes, archive.write(part, dtype)))


def entries(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        return {name.partition("/")[2]: zipped.read(name) for name in zipped.namelist()}


def test_what_both_write_is_the_same():
    plain = {"epoch": 0, "marks": [True, None, "x"]}
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    ours, torchs = entries(archive.of_plain(plain)), entries(buffer.getvalue())
    assert set(ours) == {"data.pkl", "byteorder", "version"} and all(torchs[name] == ours[name] for name in ours)
    tensor = torch.arange(6.0).view(2, 3)
    ours, torchs = entries(whole(bits.from_torch(tensor), "F32")), entries(saved(tensor))
    assert set(ours) == {"data.pkl", "byteorder", "data/0", "version"}
    assert all(torchs[name] == ours[name] for name in ("byteorder", "data/0", "version"))


def test_the_records_of_the_zip_file():
    """Each follows the one before, its data at a multiple of 64, and the fields that nobody needs are zero."""
    content = whole(np.arange(7, dtype=np.uint16), "BF16")
    before, data, after = archive.write(np.arange(7, dtype=np.uint16), "BF16")
    assert len(before) % 64 == 0 and bytes(data) == np.arange(7, dtype=np.uint16).tobytes()
    assert after.startswith(b"PK\3\4")
    at = 0
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        for info in zipped.infolist():
            assert info.header_offset == at
            name, extra = struct.unpack_from("<2H", content, at + 26)
            padding = content[at + 30 + name : at + 30 + name + extra]
            assert padding[:2] == b"FB" and struct.unpack_from("<H", padding, 2) == (extra - 4,)
            assert padding[4:] == b"Z" * (extra - 4)
            assert struct.unpack_from("<5H", content, at + 4) == (0, 0, 0, 0, 0)
            start = at + 30 + name + extra
            assert start % 64 == 0 and info.compress_type == zipfile.ZIP_STORED
            zeros = (info.create_version, info.extract_version, info.flag_bits, info.internal_attr, info.external_attr)
            assert not any(zeros) and info.volume == 0 and info.extra == info.comment == b""
            assert content[start : start + info.file_size] == zipped.read(info.filename)
            at = start + info.file_size
        assert zipped.start_dir == at and zipped.comment == b""
    directory = sum(46 + len(info.filename) for info in zipped.infolist())
    assert content[at + directory :] == struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 4, 4, directory, at, 0)


def test_an_entry_that_needs_the_long_form_is_refused():
    archive._Zip().head("x", (1 << 32) - 1, 0)
    with pytest.raises(AssertionError, match="zip64"):
        archive._Zip().head("x", 1 << 32, 0)


def read(path: Path, content: bytes, wanted: tuple[int, ...]) -> tuple[np.ndarray, str]:
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return archive.read(descriptor, 0, len(content), wanted)
    finally:
        os.close(descriptor)


def archived(pickled: bytes, data: bytes = bytes(48), compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as zipped:
        zipped.writestr("archive/data.pkl", pickled)
        zipped.writestr("archive/data/0", data)
    return buffer.getvalue()


def pickled(offset: int = 0, shape: Any = (2, 3), strides: Any = (3, 1)) -> bytes:
    """What torch.save pickles of float32, with any numbers in it."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x0ctQ"
    numbers = b"".join(pickle.dumps(part, protocol=2)[2:-1] for part in (offset, shape, strides))
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"\x89ccollections\nOrderedDict\n)RtR."


def test_a_view_may_reach_to_the_last_byte_and_no_further(tmp_path):
    data = np.arange(12, dtype=np.float32).tobytes()
    for offset, strides in ((0, (3, 1)), (6, (3, 1)), (0, (1, 5)), (0, (9, 1))):
        part, dtype = read(tmp_path / "x", archived(pickled(offset, strides=strides), data), (2, 3))
        wanted = torch.arange(12.0).as_strided((2, 3), strides, offset).numpy()
        assert dtype == "F32" and np.array_equal(part.view(np.float32), wanted)
    for offset, strides in (
        (7, (3, 1)),
        (0, (1, 6)),
        (0, (10, 1)),
        (-1, (3, 1)),
        (6, (-3, 1)),
        (6, (3, -1)),
        (1, (9, 1)),
    ):
        with pytest.raises(ValueError, match="outside the archive"):
            read(tmp_path / "x", archived(pickled(offset, strides=strides), data), (2, 3))


def test_a_tensor_that_was_not_expected(tmp_path):
    for content, wanted in (
        (archived(pickled()), (3, 2)), (archived(pickled()), (6,)),
        (archived(pickled(), compression=zipfile.ZIP_DEFLATED), (2, 3)),
        (archived(pickled() + bytes((1 << 20) + 1)), (2, 3)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="not the"):
            read(tmp_path / "x", content, wanted)
    read(tmp_path / "x", archived(pickled() + bytes((1 << 20) - len(pickled()))), (2, 3))
    for name in (b"os\nsystem", b"torch\nFloat", b"torch._utils\n_rebuild_tensor"):
        with pytest.raises(pickle.UnpicklingError, match="unexpected"):
            read(tmp_path / "x", archived(b"\x80\x02c" + name + b"\n."), (2, 3))


def test_data_that_ends_too_early(tmp_path):
    content = whole(np.arange(500, dtype=np.uint32), "F32")
    path = tmp_path / "x"
    path.write_bytes(content)
    descriptor = os.open(path, os.O_RDONLY)
    part, _ = archive.read(descriptor, 0, len(content), (500,))
    assert np.array_equal(part, np.arange(500))
    with pytest.raises(EOFError):
        archive.fill(descriptor, memoryview(bytearray(10)), len(content) - 5)
    os.close(descriptor)


def test_the_kernel_may_read_less_than_is_asked_for(tmp_path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:7]], offset))
    part, dtype = read(tmp_path / "x", whole(np.arange(50, dtype=np.uint32), "F32"), (50,))
    assert np.array_equal(part, np.arange(50)) and dtype == "F32"


def test_a_part_of_a_file_is_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"..abcdef..")
    descriptor = os.open(tmp_path / "x", os.O_RDONLY)
    file = archive.Extent(descriptor, 2, 6)
    assert file.readable() and file.seekable() and file.read(100) == b"abcdef" and file.read(1) == b""
    assert file.seek(1) == 1 and file.read(2) == b"bc" and file.seek(1, 1) == 4 and file.read() == b"ef"
    assert file.seek(-2, 2) == 4 and file.read(1) == b"e" and file.seek(-9) == 0 and file.tell() == 0
    assert file.seek(50) == 50 and file.read(3) == b""
    os.close(descriptor)
