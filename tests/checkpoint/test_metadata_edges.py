"""torch_dist's metadata: foreign pickles, files that are missing, chunks that do not fit, and where new chunks go."""

from __future__ import annotations

import collections
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tensor_of, write_torch_dist
from slipway.checkpoint import archive, dcp, torch_dist
from slipway.errors import DataError, UsageError
from slipway.tensors.refs import Ref, TensorInfo
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo


def test_what_torch_assumes_of_a_tensor():
    pickled = dcp.dumps(dcp.TensorProperties(dtype="F32"))
    found, wanted = pickle.loads(pickled), torchs.TensorProperties(torch.float32)
    assert vars(found) == vars(wanted) and pickled.startswith(b"\x80\x02")


def test_objects_of_other_classes_hold_fields_and_run_nothing():
    found = dcp.loads(b"\x80\x02cos\nsystem\n)\x81}X\x01\x00\x00\x00aK\x07sb.")
    assert type(found).__name__ == "system" and found.a == 7 and isinstance(found, dcp.Fields)
    assert isinstance(dcp.loads(b"\x80\x02cother\nbfloat16\n)\x81."), dcp.Fields), "a dtype of another module"
    assert dcp.loads(b"\x80\x02ctorch\nbfloat16\n.") == "BF16"
    assert isinstance(dcp.loads(b"\x80\x02cother\nMetadata\n)\x81."), dcp.Fields)
    assert not isinstance(dcp.loads(b"\x80\x02cother\nMetadata\n)\x81."), dcp.Metadata)
    ordered = collections.OrderedDict(a=1)
    for plain in (ordered, {1, 2}):
        found = dcp.loads(pickle.dumps(plain, protocol=4))
        assert found == plain and type(found) is type(plain)
    member = dcp.loads(b"\x80\x02cbuiltins\ngetattr\ncsome\nEnum\nX\x01\x00\x00\x00a\x86R.")
    assert type(member) is dcp.Fields


def test_the_folder_with_the_metadata(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        torch_dist.weights_folder(tmp_path / "none")
    with pytest.raises(DataError, match=r"weights/\.metadata is missing"):
        torch_dist.weights_folder(tmp_path)
    for place in ("inner", "inner/weights"):
        (tmp_path / place).mkdir()
        (tmp_path / place / ".metadata").touch()
        assert torch_dist.weights_folder(tmp_path / "inner") == tmp_path / place


@pytest.mark.parametrize("text, name", [("7", "iter_0000007"), ("12345678\n", "iter_12345678"), ("release", "release")])
def test_the_newest_iteration(tmp_path, text, name):
    assert torch_dist.newest(tmp_path) == tmp_path
    (tmp_path / torch_dist.TRACKER).write_text(text)
    with pytest.raises(DataError, match=f"there is no {name}"):
        torch_dist.newest(tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / ".metadata").touch()
    assert torch_dist.newest(tmp_path) == torch_dist.weights_folder(tmp_path) == tmp_path / name


def checkpoint(
    folder: Path, chunks: list[tuple[tuple[int, ...], torch.Tensor]], shape: tuple[int, ...], **changes: Any
):
    """A tensor "a" whose chunks, given by where each begins, lie in one file each."""
    folder.mkdir()
    boxes, storage = [], {}
    for number, (offsets, part) in enumerate(chunks):
        blob = b"".join(map(bytes, archive.write(part.numpy().view(np.uint32), "F32")))
        name = changes.get("file", f"__{number}_0.distcp")
        (folder / f"__{number}_0.distcp").write_bytes(b"." * 7 + blob)
        boxes.append(torchs.ChunkStorageMetadata(torch.Size(offsets), torch.Size(changes.get("sizes", part.shape))))
        where = _StorageInfo(name, changes.get("start", 7), changes.get("length", len(blob)))
        storage[torchs.MetadataIndex("module.a", torch.Size(offsets))] = where
    properties = torchs.TensorProperties(changes.get("dtype", torch.float32))
    state = {"module.a": torchs.TensorStorageMetadata(properties, torch.Size(shape), boxes)}
    (folder / ".metadata").write_bytes(pickle.dumps(torchs.Metadata(state, storage_data=storage)))
    return torch_dist.Reader(folder)


WHOLE = torch.arange(24.0).view(4, 6)
CUTS = {
    "rows": [((0, 0), WHOLE[:1]), ((1, 0), WHOLE[1:])],
    "columns": [((0, 0), WHOLE[:, :2]), ((0, 2), WHOLE[:, 2:3]), ((0, 3), WHOLE[:, 3:])],
    "both": [((r, c), WHOLE[r : r + 2, c : c + 3]) for r in (0, 2) for c in (0, 3)],
}


@pytest.mark.parametrize("cut", CUTS)
def test_any_rows_of_any_chunks(tmp_path, cut):
    reader = checkpoint(tmp_path / "x", CUTS[cut], (4, 6))
    assert torch.equal(tensor_of(reader, "a"), WHOLE)
    for start in range(4):
        for stop in range(start + 1, 5):
            part = reader.read(Ref("a", (), (start, stop))).view(np.float32)
            assert np.array_equal(part, WHOLE[start:stop].numpy())
        assert np.array_equal(reader.read(Ref("a", (start,))).view(np.float32), WHOLE[start].numpy())
    assert [reader.cuts("a", axis) for axis in (0, 1)] == {"rows": [2, 1], "columns": [1, 3], "both": [2, 2]}[cut]
    assert reader.extents == {f.name: f.stat().st_size for f in reader.files()} and len(reader.files()) == len(
        CUTS[cut]
    )


def test_chunks_with_gaps_or_overlaps(tmp_path):
    for number, chunks in enumerate((
        [((0, 0), WHOLE[:1]), ((2, 0), WHOLE[2:])],
        [((0, 0), WHOLE[:3]), ((2, 0), WHOLE[2:])],
        [((0, 0), WHOLE[:, :3]), ((0, 2), WHOLE[:, 2:5])],
        [],
    )):  # fmt: skip
        reader = checkpoint(tmp_path / str(number), chunks, (4, 6))
        with pytest.raises(DataError, match="leave gaps or overlap"):
            reader.read(Ref("a"))


@pytest.mark.parametrize(
    "chunks, changes",
    [
        ([((1, 0), WHOLE)], {}), ([((0, 1), WHOLE)], {}), ([((0, -1), WHOLE)], {}),
        ([((0, 0), WHOLE)], {"sizes": (4, -6)}),
        ([((0, 0), WHOLE)], {"file": "../x"}), ([((0, 0), WHOLE)], {"file": "/x"}), ([((0, 0), WHOLE)], {"start": -1}),
        ([((0, 0), WHOLE)], {"length": -1}), ([((0, 0), WHOLE)], {"dtype": torch.complex64}), ([((0,), WHOLE)], {}),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be(tmp_path, chunks, changes):
    with pytest.raises(DataError, match="is damaged"):
        checkpoint(tmp_path / "x", chunks, (4, 6), **changes)


def test_an_archive_that_is_not_what_the_metadata_says(tmp_path):
    for number, (changes, message) in enumerate([
        ({"dtype": torch.float64}, "does not match .metadata"), ({"sizes": (2, 6)}, "is damaged"),
        ({"length": 100}, "is damaged"), ({"start": 8}, "is damaged"),
    ]):  # fmt: skip
        reader = checkpoint(tmp_path / str(number), [((0, 0), WHOLE)], (4, 6), **changes)
        with pytest.raises(DataError, match=message):
            reader.read(Ref("a", (), (0, 2)))


def test_files_that_are_missing(tmp_path):
    checkpoint(tmp_path / "x", CUTS["rows"], (4, 6))
    (tmp_path / "x" / "__1_0.distcp").unlink()
    with pytest.raises(DataError, match=r"file __1_0\.distcp is missing"):
        torch_dist.Reader(tmp_path / "x")
    assert torch_dist.Reader(tmp_path / "x", whole=False).tensors == {"a": TensorInfo((4, 6), "F32")}


def test_keys_of_nemo_and_of_megatron(tmp_path):
    write_torch_dist(tmp_path / "x", {"a": WHOLE, "optimizer.b": WHOLE})
    assert torch_dist.Reader(tmp_path / "x").tensors.keys() == {"a", "optimizer.b"}


def test_new_chunks_follow_each_other_until_a_file_is_full(monkeypatch):
    tensors = {"a": TensorInfo((4, 6), "F32"), "b": TensorInfo((2,), "BF16")}
    refs = [Ref("a", (), (0, 2)), Ref("a", (), (2, 4)), Ref("b")]
    lengths = [archive.length((2, 6), "F32")] * 2 + [archive.length((2,), "BF16")]
    state = len(archive.EMPTY_STATE)
    layout = torch_dist.Layout(tensors, refs, ["layer._extra_state"])
    starts = [0, lengths[0], 2 * lengths[0]]
    assert [layout.places[ref] for ref in refs] == [("__0_0.distcp", *p) for p in zip(starts, lengths, strict=True)]
    assert layout.extra == {"layer._extra_state": ("__0_0.distcp", sum(lengths), state)}
    assert layout.sizes == {"__0_0.distcp": sum(lengths) + state}
    for most, files in ((2 * lengths[0], [0, 0, 1]), (2 * lengths[0] - 1, [0, 1, 1]), (1, [0, 1, 2])):
        monkeypatch.setattr(torch_dist, "FILE_BYTES", most)
        layout = torch_dist.Layout(tensors, refs, [])
        assert [layout.places[ref][0] for ref in refs] == [f"__0_{number}.distcp" for number in files]


def test_the_metadata_of_new_chunks_as_torch_reads_it():
    tensors = {"a": TensorInfo((3, 4, 6), "F32")}
    refs = [Ref("a", (1,)), Ref("a", (2,), (1, 3))]
    layout = torch_dist.Layout(tensors, refs, ["x._extra_state"])
    found = pickle.loads(layout.metadata())
    entry = found.state_dict_metadata["module.a"]
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks] == [
        ((1, 0, 0), (1, 4, 6)),
        ((2, 1, 0), (1, 2, 6)),
    ]
    assert entry.size == torch.Size((3, 4, 6)) and entry.properties == torchs.TensorProperties(torch.float32)
    assert isinstance(found.state_dict_metadata["module.x._extra_state"], torchs.BytesStorageMetadata)
    wanted = {("module.a", (1, 0, 0)): layout.places[refs[0]], ("module.a", (2, 1, 0)): layout.places[refs[1]]}
    wanted["module.x._extra_state", None] = layout.extra["x._extra_state"]
    places = {
        (at.fqn, at.offset and tuple(at.offset)): (where.relative_path, where.offset, where.length)
        for at, where in found.storage_data.items()
    }
    assert places == wanted
    assert (found.planner_data, found.storage_meta) == (None, None)


def test_the_marks_of_the_format():
    state = torch.load(io.BytesIO(torch_dist.common_state()), weights_only=True)
    assert state == {
        "epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.4.0", "state_dict": {}, "optimizer_states": [],
        "lr_schedulers": [], "content_metadata": {
            "singleton_local_shards": False, "chained_optim_avoid_prefix": True,
            "distrib_optim_sharding_type": "dp_reshardable",
        },
    }  # fmt: skip
    assert json.loads(torch_dist.FORMAT) == {
        "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
        "common_backend_version": 1,
    }  # fmt: skip


def test_a_dtype_that_is_a_word(tmp_path):
    """The fuzzer found it: a text stands where torch's dtype is."""
    write_torch_dist(tmp_path / "weights", {"a": torch.ones(2)})
    path = tmp_path / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.state_dict_metadata["module.a"].properties.dtype = "__class__"
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(DataError, match=r"\.metadata is damaged"):
        torch_dist.Reader(tmp_path)


@pytest.mark.parametrize("alpha", ["2001-99-99", "1e", "--1", ".", "9" * 5000])
def test_an_alpha_that_is_no_number(alpha, tmp_path):
    """The fuzzer found a date in model.yaml."""
    from types import SimpleNamespace

    from slipway.checkpoint import lora

    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text(f"model_transform:\n  alpha: {alpha}\n  dim: 4\n")
    with pytest.raises(DataError, match="does not contain the adapters' alpha"):
        lora.settings_of(SimpleNamespace(folder=tmp_path / "weights"))
