"""What commands that convert have in common: arguments before the plan, the plan before any writing, the summary."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from slipway.checkpoint import huggingface, job, quantization, shards
from slipway.checkpoint.forecast import Forecast
from slipway.checkpoint.stream import Piece, Plan
from slipway.errors import DataError, PreflightError, UsageError
from slipway.tensors.refs import Ref, TensorInfo


def plan(identity: str = "x") -> tuple[Plan, dict[str, object]]:
    pieces = [Piece(3, lambda: [("a", 0, b"abc")]), Piece(2, lambda: [("a", 3, b"de")])]
    return Plan({"a": 5}, pieces, {"b": b"{}"}, {}, [identity]), {"tensors": 2}


def unplanned():
    raise AssertionError("it is not planned: headers of a large model take a while")


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_is_written_and_said(tmp_path):
    found = job.carry_out("import", str(tmp_path / "out"), "1MB", plan)
    assert content(tmp_path / "out") == {"a": b"abcde", "b": b"{}"}
    assert (found.command, found.wrote, found.bytes) == ("import", str(tmp_path / "out"), 7)
    assert 0 < found.seconds < 60 and found.details == {"tensors": 2}


def test_arguments_come_before_the_plan(tmp_path):
    with pytest.raises(UsageError, match=r"^--memory"):
        job.carry_out("import", str(tmp_path / "out"), "much", unplanned)
    with pytest.raises(UsageError, match="cannot write to hf://org/name"):
        job.carry_out("import", "hf://org/name", "1MB", unplanned)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").touch()
    with pytest.raises(UsageError, match="mine exists"):
        job.carry_out("import", str(tmp_path / "mine"), "1MB", unplanned)
    with pytest.raises(UsageError, match="holds no model"):
        job.carry_out("import", str(tmp_path / "mine"), "1MB", unplanned, overwrite=True)
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UsageError, match="link exists"):
        job.carry_out("import", str(tmp_path / "link"), "1MB", unplanned)


def test_a_dry_run_says_what_it_would_take(tmp_path):
    found = job.carry_out("import", str(tmp_path / "out"), "1MB", plan, dry_run=True)
    assert isinstance(found, Forecast) and not list(tmp_path.iterdir())
    assert (found.command, found.out, found.reads, found.writes) == ("import", str(tmp_path / "out"), 5, 7)


def test_the_same_again_and_another(tmp_path):
    out = str(tmp_path / "out")
    job.carry_out("import", out, "1MB", plan)
    again = job.carry_out("import", out, "1MB", plan)
    assert "nothing was written" in again.details["notes"][0] and again.bytes == 7
    with pytest.raises(UsageError, match="made from another source"):
        job.carry_out("import", out, "1MB", lambda: plan("y"))


def test_another_in_its_place(tmp_path):
    out = tmp_path / "out"
    job.carry_out("import", str(out), "1MB", plan)
    (out / "weights").mkdir()  # by which it is known as a model

    def other():
        return Plan({"z": 2}, [Piece(2, lambda: [("z", 0, b"zz")])], {}, {}, ["z"]), {}

    found = job.carry_out("import", str(out), "1MB", other, overwrite=True)
    assert content(out) == {"z": b"zz"} and found.wrote == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.slipway.json", "out"], "nothing is left beside it"
    assert "nothing was written" in job.carry_out("import", str(out), "1MB", other).details["notes"][0]


def test_all_names_are_there():
    assert {name for name in huggingface.__all__ if not hasattr(huggingface, name)} == set()


# ---------------------------------------------------------------------------- headers of safetensors


def header(entries: object, data: bytes = b"", pad: int = 0) -> bytes:
    text = json.dumps(entries).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: object, end: object, shape: object = (1,), dtype: object = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def read(tmp_path: Path, content: bytes) -> dict[str, shards.Stored]:
    (tmp_path / "x.safetensors").write_bytes(content)
    return shards.read_header(tmp_path / "x.safetensors")


def test_where_the_tensors_are(tmp_path):
    entries = {"__metadata__": {"format": "pt"}, "a": entry(0, 2, [2]), "b": entry(2, 10, [2, 2], "BF16")}
    found = read(tmp_path, header(entries, bytes(10)))
    start = len(header(entries))
    assert found["a"] == shards.Stored(tmp_path / "x.safetensors", start, TensorInfo((2,), "U8"))
    assert found["b"] == shards.Stored(tmp_path / "x.safetensors", start + 2, TensorInfo((2, 2), "BF16"))
    assert read(tmp_path, header({})) == {}, "the shortest file: a header of two bytes, and nothing after it"


def test_empty_tensors_may_be_anywhere(tmp_path):
    entries = {"a": entry(0, 4, [4]), "none": entry(0, 0, [0]), "last": entry(4, 4, [0, 9])}
    assert set(read(tmp_path, header(entries, bytes(4)))) == {"a", "none", "last"}


@pytest.mark.parametrize(
    "made, said",
    [
        (struct.pack("<Q", 1) + b" ", r"header of 1 bytes in 9"),
        (header({})[:7], r"header of 0 bytes in 7"),
        (struct.pack("<Q", 3) + b"{}", r"header of 3 bytes in 10"),
        (header([]), "not a JSON object"),
        (header({"a": entry(0, 1)}), r"ends inside tensor a \(\d+ bytes of \d+\)"),
        (header({"a": entry(0, 2)}, bytes(2)), "has 2 bytes, but its shape needs 1"),
        (header({"a": entry(0, 2, [2]), "b": entry(1, 3, [2])}, bytes(3)), "tensors a and b overlap"),
        (header({"b": entry(0, 2, [2]), "a": entry(1, 3, [2])}, bytes(3)), "tensors b and a overlap"),
        (header({"a": entry(0, 1 << 60, [1 << 60])}), "entry of tensor a is damaged"),
        (header({"a": entry(0, -1, [1])}), "entry of tensor a is damaged"),
        (header({"a": entry(0, True, [1])}), "entry of tensor a is damaged"),
        (header({"a": entry(0, 1, [1.0])}, b"x"), "entry of tensor a is damaged"),
        (header({"a": entry(0, 1, [1], ["U8"])}, b"x"), "entry of tensor a is damaged"),
        (header({"a": entry(0, 1, [1], "X9")}, b"x"), "unknown dtype 'X9'"),
    ],
)
def test_headers_that_are_damaged(tmp_path, made, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, made)


def test_an_offset_that_is_just_small_enough_is_believed(tmp_path):
    most = (1 << 60) - 1
    with pytest.raises(DataError, match="ends inside tensor a"):
        read(tmp_path, header({"a": entry(0, most, [most])}))


# ---------------------------------------------------------------------------- folders and layouts


def model(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(header({name: entry(0, 1)}, b"x"))
    return folder


def test_which_files_are_read(tmp_path):
    both = model(tmp_path / "both", "model.safetensors", "model-00001-of-00001.safetensors")
    (both / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    notes: list[str] = []
    assert set(huggingface.read_folder(both, notes)) == {"model.safetensors"}
    assert notes == [
        "model.safetensors is read, and not the files of model.safetensors.index.json, as transformers does"
    ]
    parts = model(tmp_path / "parts", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")
    with pytest.raises(DataError, match=r"tell of model-00002-of-00003\.safetensors, which is missing"):
        huggingface.read_folder(parts)
    many = model(tmp_path / "many", "model-000001-of-100001.safetensors")
    with pytest.raises(DataError, match="at most 100,000 files"):
        huggingface.read_folder(many)
    for name, form in (("x.gguf", "GGUF"), ("x.h5", "TensorFlow's form"), ("other.safetensors", "of other names")):
        with pytest.raises(DataError, match=form):
            huggingface.read_folder(model(tmp_path / name, name))
    with pytest.raises(DataError, match="give the folder of a Hugging Face model"):
        huggingface.read_folder(model(tmp_path / "none", "notes.txt"))


def test_what_an_index_promises(tmp_path):
    folder = model(tmp_path / "model", "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    mine = "model-1.safetensors"
    index.write_text(json.dumps({"weight_map": {mine: mine, "lm_head.weight": mine}}))
    assert set(huggingface.read_folder(folder)) == {"model-1.safetensors"}, "a tied model's index may list the head"
    index.write_text('{"weight_map": {"model-1.safetensors": "model-1.safetensors", "b": "model-1.safetensors"}}')
    with pytest.raises(DataError, match=r"tensor b is not in model-1\.safetensors"):
        huggingface.read_folder(folder)
    index.write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(DataError, match=r"names model-2\.safetensors, which is missing"):
        huggingface.read_folder(folder)
    for away in ("../x", "/etc/x", "a/b", ""):
        index.write_text(json.dumps({"weight_map": {"a": away}}))
        with pytest.raises(DataError, match="does not map tensors to files"):
            huggingface.read_folder(folder)


def test_a_layout_fills_files_in_order():
    tensors = {"a": TensorInfo((4,), "U8"), "b": TensorInfo((2, 3), "BF16"), "c": TensorInfo((9,), "U8")}
    one = huggingface.Layout(tensors, 100)
    assert list(one.sizes) == ["model.safetensors"] and one.index() is None
    two = huggingface.Layout(tensors, 16)
    assert list(two.sizes) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert [two.places[name][0][8] for name in "abc"] == ["0"] * 3
    assert [two.places[name][0] for name in "abc"] == [*[next(iter(two.sizes))] * 2, list(two.sizes)[1]]
    assert len(huggingface.Layout(tensors, 15).sizes) == 3, "12 bytes and 4 are more than 15"
    for file, size in two.sizes.items():
        text = two.headers[file]
        assert len(text) % 8 == 0 and struct.unpack("<Q", text[:8])[0] == len(text) - 8
        of_file = [info.bytes for name, info in tensors.items() if two.places[name][0] == file]
        assert size == len(text) + sum(of_file)
    file, begins = two.places["b"]
    assert two.place(Ref("b", (1,))) == (file, begins + 6) and begins == len(two.headers[file]) + 4
    index = json.loads(two.index())
    assert index["metadata"] == {"total_parameters": 19, "total_size": 25} and set(index["weight_map"]) == set("abc")


def test_what_is_left_out_by_its_name():
    for name, kind in (
        ("model.layers.0.self_attn.k_scale", "the KV cache"), ("m.prob_output_scale", "the KV cache"),
        ("m.q_proj.output_scale", "the KV cache"), ("m.down_proj.output_scale", "activations"),
        ("m.down_proj.input_global_scale", "activations"), ("m.o_proj.output_global_scale", "activations"),
        ("m.v_proj.output_global_scale", "the KV cache"), ("m.rotary_emb.inv_freq", "rotary_emb"),
        ("m.inv_freq", ""), ("m.weight", ""), ("m.weight_scale", ""),
    ):  # fmt: skip
        assert huggingface.left_out(name) == kind, name


# ---------------------------------------------------------------------------- what decodes


def test_devices(monkeypatch, tmp_path):
    import torch

    asked = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: asked.append("torch") or 2)
    monkeypatch.setattr(quantization, "GPU_DRIVER", tmp_path / "none")
    assert quantization.devices("auto") == quantization.devices("cpu") == ["cpu"] and not asked, "torch is not imported"
    assert quantization.devices("cuda") == ["cuda:0", "cuda:1"]
    monkeypatch.setattr(quantization, "GPU_DRIVER", tmp_path)
    asked.clear()
    found = quantization.devices("auto")
    assert not asked, "they are looked for when one is needed"
    assert list(found) == ["cuda:0", "cuda:1"] and quantization.devices("cpu") == ["cpu"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert list(quantization.devices("auto")) == ["cpu"]
    with pytest.raises(PreflightError, match="torch finds no GPU"):
        quantization.devices("cuda")


def test_the_driver_is_where_linux_has_it():
    assert str(quantization.GPU_DRIVER) == "/dev/nvidiactl"


@pytest.mark.parametrize("at_once", [1, 64, 1 << 18])
@pytest.mark.parametrize("block", [(2, 3), (1, 4), (4, 8), (3, 16)])
def test_blocks_in_pieces_of_any_size(monkeypatch, at_once, block):
    """However few codes are decoded at once, every element is its code times the scale of its block."""
    monkeypatch.setattr(quantization, "CODES_AT_ONCE", at_once)
    generator = np.random.default_rng(5)
    codes = generator.integers(0, 126, (11, 8), dtype=np.uint8)
    scale = generator.random((-(-11 // block[0]), -(-8 // block[1])), dtype=np.float32)
    values = quantization.e4m3()[codes] * np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[:11, :8]
    from slipway.tensors.bits import to_bfloat16

    for first in (0, 1, 5):
        found = quantization.decode_fp8_block(codes[first:], scale, block, first)
        assert np.array_equal(found, to_bfloat16(values[first:].astype(np.float32))), (first, block)
