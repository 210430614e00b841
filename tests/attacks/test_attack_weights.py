"""Code in the pickles of a torch_dist checkpoint.

What it does: torch loads weights/.metadata, and every object in it that is not a tensor, as pickles that may call
anything. A foreign one calls os.system; or reaches it by attributes of what is known.

What must happen: exit code 65 and one line that says what is named, before NeMo is imported; nothing is called. The
same for files that are garbled: they would be found after a minute.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from arena import run_that_goes_on
from slipway.checkpoint import archive, handover
from slipway.errors import DataError
from torch.distributed.checkpoint import metadata as torchs
from torch.distributed.checkpoint.filesystem import _StorageInfo


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def code(marker: Path) -> Call:
    import os

    return Call(os.system, f"touch {marker}")


def with_metadata(nemo: Path, change) -> None:
    path = nemo / "weights" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata, protocol=2))


def with_object(nemo: Path, content: bytes, key: str = "module.decoder._extra_state/shard_0_1") -> None:
    (nemo / "weights" / "more.distcp").write_bytes(content)

    def change(metadata) -> None:
        metadata.state_dict_metadata[key] = torchs.BytesStorageMetadata()
        metadata.storage_data[torchs.MetadataIndex(key)] = _StorageInfo("more.distcp", 0, len(content))

    with_metadata(nemo, change)


def in_metadata(nemo: Path, marker: Path) -> None:
    with_metadata(nemo, lambda metadata: setattr(metadata, "planner_data", code(marker)))


def by_attributes(nemo: Path, marker: Path) -> None:
    inner = Call(getattr, torchs.Metadata, "__init__")
    with_metadata(nemo, lambda m: setattr(m, "planner_data", Call(getattr, inner, "__globals__")))


def in_an_object(nemo: Path, marker: Path) -> None:
    with_object(nemo, archive.of_plain([code(marker)]))


def in_an_object_of_another_kind(nemo: Path, marker: Path) -> None:
    with_object(nemo, archive.of_plain({"state": code(marker)}), "optimizer.state")


def in_common(nemo: Path, marker: Path) -> None:
    (nemo / "weights" / "common.pt").write_bytes(archive.of_plain({"x": code(marker)}))


def bytes_in_a_state(nemo: Path, marker: Path) -> None:
    """Transformer Engine loads the elements of a tensor of uint8 as a pickle."""
    import io

    import torch

    kept = io.BytesIO()
    torch.save(torch.frombuffer(bytearray(pickle.dumps(code(marker))), dtype=torch.uint8), kept)
    with_object(nemo, kept.getvalue())


def garbled(name: str):
    def spoil(nemo: Path, marker: Path) -> None:
        content = (nemo / "weights" / name).read_bytes()
        (nemo / "weights" / name).write_bytes(b"\x80\x02" + bytes(range(256)) + content[300:])

    return spoil


def shortened(name: str):
    def spoil(nemo: Path, marker: Path) -> None:
        content = (nemo / "weights" / name).read_bytes()
        (nemo / "weights" / name).write_bytes(content[: len(content) // 2])

    return spoil


def without_a_pickle(nemo: Path, marker: Path) -> None:
    """The fuzzer found it: an archive that has everything but data.pkl."""
    path = nemo / "weights" / "common.pt"
    path.write_bytes(path.read_bytes().replace(b"data.pkl", b"data.pkm"))


def by_modelopt(nemo: Path, marker: Path) -> None:
    """NeMo asks for it whenever it builds a model, and loads it without limits."""
    import torch

    (nemo / "weights" / "modelopt_state").mkdir()
    torch.save({"modelopt_version": "0.37.0", "x": code(marker)}, nemo / "weights" / "modelopt_state" / "common.pt")


def by_modelopt_elsewhere(nemo: Path, marker: Path) -> None:
    by_modelopt(nemo, marker)
    (nemo / "weights" / "modelopt_state").rename(nemo / "elsewhere")
    (nemo / "weights" / "modelopt_state").symlink_to("../elsewhere")


def a_folder(nemo: Path, marker: Path) -> None:
    (nemo / "weights" / "state").mkdir()


ATTACKS = {
    "modelopt_state": (by_modelopt, "ModelOpt has changed this model"),
    "modelopt_state is a link": (by_modelopt_elsewhere, "ModelOpt has changed this model"),
    "a folder": (a_folder, "is a folder"),
    "common.pt without its pickle": (without_a_pickle, "damaged"),
    ".metadata": (in_metadata, "system"),
    ".metadata, by attributes": (by_attributes, "reads an attribute"),
    "an extra state": (in_an_object, "system"),
    "another object": (in_an_object_of_another_kind, "system"),
    "common.pt": (in_common, "system"),
    "a pickle in a tensor": (bytes_in_a_state, "load as a pickle"),
    **{f"{name} is garbled": (garbled(name), "damaged") for name in (".metadata", "common.pt")},
    **{f"{name} is cut": (shortened(name), "damaged") for name in (".metadata", "common.pt")},
    "metadata.json is garbled": (garbled("metadata.json"), "as JSON"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused(nemo, tmp_path, name):
    handover.check(nemo)
    ATTACKS[name][0](nemo, tmp_path / "marker")
    with pytest.raises(DataError) as error:
        handover.check(nemo)
    assert ATTACKS[name][1] in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [".metadata", "common.pt is garbled"])
def test_train_says_so_at_once(arena, nemo, samples, tmp_path, name):
    ATTACKS[name][0](nemo, tmp_path / "marker")
    found = arena.run("train", "--model", nemo, "--data", samples, "--out", tmp_path / "run")
    assert ATTACKS[name][1] in found.check(65, lines=None)
    assert not (tmp_path / "marker").exists() and found.seconds < 8


def test_a_run_that_goes_on_does_not_load_it(arena, nemo, samples, tmp_path):
    words, newest = run_that_goes_on(arena, nemo, samples, tmp_path / "run")
    by_modelopt(newest, tmp_path / "marker")
    assert "step=2/weights/modelopt_state" in arena.run(*words).check(65, lines=None)
    assert not (tmp_path / "marker").exists()


def test_what_torch_writes_is_taken(nemo):
    """Objects of training: numbers, words, and tensors and arrays of them."""
    import io

    import numpy as np
    import torch

    kept = io.BytesIO()
    state = {"a": [1, 2.5, None, "x", b"y"], "t": torch.ones(3), "n": np.arange(4), "d": torch.bfloat16}
    torch.save(state, kept)
    with_object(nemo, kept.getvalue(), "rng_state")
    with_object(nemo, archive.EMPTY_STATE)
    handover.check(nemo)
