"""Files of a few bytes that ask for hours or gigabytes.

What they do: config.json with five million layers, or with matrices of 2^30 × 2^30; a .metadata whose key is a tuple
doubled 59 times, that asks for 3 GB in twelve bytes, or that gives one long list to each of many tensors.

What must happen: exit code 65 and one line, within ten seconds of the processor and the memory that a file explains.
"""

from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path

import pytest
from slipway.checkpoint import dcp, torch_dist
from slipway.errors import DataError
from slipway.families import FAMILIES

HUGE = 1 << 30
CONFIGS = {
    "layers": {"num_hidden_layers": 5_000_000, "layer_types": ...},
    "sizes": {"hidden_size": HUGE, "intermediate_size": HUGE, "vocab_size": HUGE},
    "width": {"hidden_size": HUGE},
    "vocabulary": {"vocab_size": HUGE},
    "heads": {"num_attention_heads": HUGE, "num_key_value_heads": HUGE},
    "size of a head": {"head_dim": HUGE},
    "experts": {name: 100_000_000 for name in ("num_local_experts", "num_experts", "n_routed_experts")},
    "many experts in many layers": {"num_hidden_layers": 1000, "num_local_experts": 1000, "layer_types": ...},
    "layers for prediction": {"num_nextn_predict_layers": 10**8},
    "a number of 300 digits": {"num_hidden_layers": 10**300},
    "a number that is none": {"rms_norm_eps": float("nan"), "hidden_size": float("inf")},
}


@pytest.mark.parametrize("command", ["inspect", "import", "init"])
@pytest.mark.parametrize("name", CONFIGS)
def test_configs(arena, model, tmp_path, name, command):
    path = model / "config.json"
    changed = json.loads(path.read_text()) | CONFIGS[name]
    path.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))
    words = [command, model] + ([] if command == "inspect" else [tmp_path / "out"])
    found = arena.run(*words)
    if found.code == 0:  # nothing of this is among the family's fields
        assert name in ("layers for prediction", "experts")
    else:
        found.check(65, 73, lines=None)  # 73: there is no room for what `init` would write
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_limits(family):
    from slipway.families import understood

    tiny = FAMILIES[family].tiny_config()
    for name in ("layers", "sizes", "width", "heads"):
        config = tiny | {key: value for key, value in CONFIGS[name].items() if value is not ...}
        with pytest.raises(DataError, match="at most"):
            understood(config, Path("config.json"))


def unicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


DOUBLED = b")" + b"q\x00h\x00\x86" * 59  # a tuple of two of the same, 59 times
PICKLES = {
    "a key doubled 59 times": b"\x80\x02}" + DOUBLED + b"K\x01s.",
    "an item of a set doubled": b"\x80\x04\x8f(" + DOUBLED + b"\x90.",
    "a set of a list": b"\x80\x02cbuiltins\nset\n]" + DOUBLED + b"a\x85R.",
    "items of an ordered dictionary": b"\x80\x02ccollections\nOrderedDict\n](" + DOUBLED + b"K\x01\x86e\x85R.",
    "three gigabytes in twelve bytes": b"\x80\x05\x96" + struct.pack("<Q", 3 << 30) + b".",
    "a long of two gigabytes": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b".",
    "bytes of eight exabytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b".",
    "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a frame without an end": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "attributes of a class": b"\x80\x02ctorch\nSize\n}" + unicode("__code__") + b"K\x01sb.",
    "many calls with one list": b"\x80\x02](" + b"K\x01" * 30_000 + b"eq\x00"
    + b"cbuiltins\nset\nq\x01" + b"h\x01h\x00\x85R0" * 0 + b"(" + b"h\x01h\x00\x85R" * 10_000 + b"t.",
    "many classes": b"\x80\x02" + b"".join(b"cm\nC%d\n" % n for n in range(50_000)) + b".",
    "nothing to take": b"\x80\x02RRRR.",
    "no end": b"\x80\x02" + b"]" * 100,
    "deep": b"\x80\x02" + b"]" + b"q\x00](h\x00e" * 50_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(arena, nemo, samples, tmp_path, name):
    (nemo / "weights" / ".metadata").write_bytes(PICKLES[name])
    for words in (["inspect", nemo], ["train", "--model", nemo, "--data", samples, "--out", tmp_path / "run"]):
        assert ".metadata" in arena.run(*words).check(65, lines=None)


def test_many_tensors_of_one_list(arena, nemo):
    """Ten thousand keys with the same ten thousand chunks: a hundred million."""
    weights = nemo / "weights"
    chunk = dcp.ChunkStorageMetadata(offsets=dcp.size((0,)), sizes=dcp.size((1,)))
    entry = dcp.TensorStorageMetadata(
        properties=dcp.TensorProperties(dtype="F32"), size=dcp.size((1,)), chunks=[chunk] * 10_000
    )
    keys = [f"k{number}" for number in range(10_000)]
    places = {
        dcp.MetadataIndex(fqn=key, offset=dcp.size((0,))): dcp.StorageInfo(relative_path="a", offset=0, length=1)
        for key in keys
    }
    whole = dcp.Metadata(state_dict_metadata=dict.fromkeys(keys, entry), storage_data=places)
    (weights / ".metadata").write_bytes(dcp.dumps(whole))
    assert "damaged" in arena.run("inspect", nemo).check(65)


@pytest.mark.parametrize(
    "changes", [{"fqn": ((),)}, {"fqn": 3}, {"offset": (((),),)}, {"offset": (-1,)}, {"offset": (True,)}], ids=repr
)
def test_places_that_are_none(tmp_path, changes):
    fields = {"fqn": "a", "offset": (0,)} | changes
    place = dcp.StorageInfo(relative_path="a", offset=0, length=1)
    metadata = dcp.Metadata(state_dict_metadata={}, storage_data={dcp.MetadataIndex(**fields): place})
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(torch_dist.UNREADABLE):
        torch_dist.places_of(metadata)


def test_a_state_dict_of_the_same_kind(arena, model):
    """The same in pytorch_model.bin: its pickle may not be compressed, and its keys are names."""
    import zipfile

    for file in model.glob("*.safetensors*"):
        file.unlink()
    for number, (name, content) in enumerate(PICKLES.items()):
        with zipfile.ZipFile(
            model / "pytorch_model.bin", "w", (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[number % 2]
        ) as z:
            z.writestr("a/data.pkl", content)
        assert arena.run("inspect", model).check(65), name
