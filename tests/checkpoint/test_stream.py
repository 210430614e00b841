"""Writing at given places, past the page cache where that can be: the bytes are those of a plain write."""

from __future__ import annotations

import errno
import mmap
import os
import random
import subprocess

import pytest
from slipway.checkpoint import stream

SIZE = 3_000_000


def written(folder, pieces: list[tuple[int, memoryview]]) -> bytes:
    path = folder / "file"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, SIZE)
    file = stream._File(path)
    for offset, data in pieces:
        file.write(offset, data)
    file.close()
    return path.read_bytes()


def pieces_of(whole: bytes) -> list[tuple[int, memoryview]]:
    """Neighbours of many lengths, in random order, their memory at any address."""
    chance, pieces, at = random.Random(0), [], 0
    while at < SIZE:
        length = min(SIZE - at, chance.choice([1, 100, 4096, 70_000, stream.DIRECT_BYTES, 400_001, 900_000]))
        place = chance.choice([0, 1, 64, 512, (-at) % 512])
        memory = memoryview(mmap.mmap(-1, length + 512))[place : place + length]
        memory[:] = whole[at : at + length]
        pieces.append((at, memory))
        at += length
    chance.shuffle(pieces)
    return pieces


def test_any_place_and_any_memory(tmp_path):
    whole = random.Random(1).randbytes(SIZE)
    assert written(tmp_path, pieces_of(whole)) == whole


def test_most_bytes_go_past_the_page_cache(tmp_path):
    """Where the file system has a way past it; the test machines' have."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "overlayfs"):
        pytest.skip(f"{kind.strip()} is nothing but memory, or says nothing of what lies below")
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    os.sync()
    file = stream._File(path)
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    file.write(100, memoryview(random.Random(1).randbytes(SIZE - 200)))
    file.close()
    with mmap.mmap(descriptor, SIZE, prot=mmap.PROT_READ) as content:
        assert resident(content) < 100_000
    os.close(descriptor)


def resident(content: mmap.mmap) -> int:
    """Bytes of a mapped file that the page cache holds."""
    import ctypes

    import numpy as np

    address = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    pages = (ctypes.c_ubyte * (-(-len(content) // mmap.PAGESIZE)))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(content)), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.parametrize("when", ["opened", "written"])
def test_a_file_system_without_a_way_past_the_cache(tmp_path, monkeypatch, when):
    real_open, real_write = os.open, os.pwrite
    direct: set[int] = set()

    def refuse_to_open(path, flags, *rest):
        if flags & os.O_DIRECT and when == "opened":
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = real_open(path, flags, *rest)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def refuse_to_write(descriptor, *rest):
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, *rest)

    whole = random.Random(2).randbytes(SIZE)
    pieces = pieces_of(whole)
    monkeypatch.setattr(os, "open", refuse_to_open)
    monkeypatch.setattr(os, "pwrite", refuse_to_write)
    assert written(tmp_path, pieces) == whole
