"""Older forms of weights: pytorch_model.bin, whose pickle is never run, and shards without an index."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from slipway.checkpoint import pytorch_bin
from slipway.checkpoint.huggingface import Reader, read_folder
from slipway.commands.dequant import dequant
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.inspect import inspect
from slipway.commands.verify import verify
from slipway.errors import DataError, SlipwayError
from slipway.families import rules
from slipway.families.quantized import Fp8
from slipway.tensors.bits import to_torch
from slipway.tensors.refs import Ref
from test_locate import REPOSITORY, env, hub  # noqa: F401  # fixtures
from test_malformed import POINTER, mutate
from test_quantized_models import files, tensors

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model in safetensors."""
    return make_model(tmp_path_factory.mktemp("models") / "hf", "llama31", quantized=False, shards=1)


def without_weights(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    return folder


def as_bin(source: Path, folder: Path, state: object = None, **options) -> Path:
    """The same model as torch.save wrote it."""
    without_weights(source, folder)
    torch.save(tensors(source) if state is None else state, folder / BIN, **options)
    return folder


# ---------------------------------------------------------------------------- what is read


def test_one_file_by_every_command(plain, tmp_path, slipway):
    old = as_bin(plain, tmp_path / "old")
    import_checkpoint(str(plain), str(tmp_path / "a"))
    done = slipway("import", old, tmp_path / "b")
    assert done.returncode == 0 and f"{BIN}: only its tensors are read; no code in it is run" in done.stderr
    assert files(tmp_path / "a") == files(tmp_path / "b")
    verify(str(plain), str(old))
    found = inspect(str(old))
    assert found.whole and list(found.files) == [BIN] and found.parameters == inspect(str(plain)).parameters
    assert inspect(str(old / BIN)).parameters == found.parameters
    assert inspect(str(old / BIN)).format == "one file of torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype, plain, tmp_path):
    old = as_bin(plain, tmp_path / "old", {name: tensor.to(dtype) for name, tensor in tensors(plain).items()})
    import_checkpoint(str(old), str(tmp_path / "nemo"))
    assert {info.dtype for info in reader(old).tensors.values()} == {
        {torch.float32: "F32", torch.float16: "F16"}[dtype]
    }


def test_as_transformers_4_saves_it_in_shards(plain, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "old", safe_serialization=False, max_shard_size="100KB")
    names = sorted(file.name for file in (tmp_path / "old").glob("pytorch_model*"))
    assert names[0] == "pytorch_model-00001-of-00003.bin" and names[-1] == INDEX
    verify(str(plain), str(tmp_path / "old"))
    assert inspect(str(tmp_path / "old")).whole
    (tmp_path / "old" / INDEX).unlink()
    verify(str(plain), str(tmp_path / "old"))
    (tmp_path / "old" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(DataError, match=r"tell of pytorch_model-00002-of-00003\.bin, which is missing; download"):
        read_folder(tmp_path / "old")
    assert inspect(str(tmp_path / "old")).problems["missing files"] == ["pytorch_model-00002-of-00003.bin"]


def test_a_tied_model_as_a_state_dict_with_its_versions(tmp_path):
    """Both names have one storage, and the dictionary has attributes, as a module's own state dict."""
    from transformers import AutoModelForCausalLM

    source = make_model(tmp_path / "hf", "qwen25_tied", quantized=False)
    state = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).state_dict()
    assert isinstance(state, OrderedDict) and state._metadata and "lm_head.weight" in state
    old = as_bin(source, tmp_path / "old", state)
    verify(str(source), str(old))
    assert inspect(str(old)).whole


def reader(folder: Path) -> Reader:
    return Reader(folder, read_folder(folder), {})


def test_parameters_views_strides_and_offsets(tmp_path, monkeypatch):
    wide = torch.randn(40, 90).bfloat16()
    stack = torch.randn(3, 20, 10)
    state = {
        "parameter": torch.nn.Parameter(wide.clone()),
        "view": wide[3:30],
        "columns": wide[:, 5:33],
        "transposed": wide.T,
        "every other": wide[::2, ::3],
        "a stack, turned": stack.permute(2, 0, 1),
        "scalar": torch.tensor(3.0),
        "nothing": torch.empty(0, 7),
        "one row": wide[4:5].T,
        "float8": torch.randn(6, 6).to(torch.float8_e5m2),
        "uint16": torch.arange(8).to(torch.uint16),  # torch writes it in another way
    }
    torch.save(state, tmp_path / BIN)
    found = reader(tmp_path)
    for name, tensor in state.items():
        for ref in [Ref(name), *([Ref(name, (), (1, tensor.shape[0] - 1))] if tensor.ndim and len(tensor) > 2 else [])]:
            wanted = tensor.detach() if ref.rows is None else tensor.detach()[slice(*ref.rows)]
            part = to_torch(found.read_stored(name, ref), found.stored[name].info.dtype)
            assert torch.equal(part.view(torch.uint8) if part.element_size() == 1 else part, bytes_of(wanted)), name
    for expert in range(10):
        part = found.read_stored("a stack, turned", Ref("a stack, turned", (expert,), (1, 3)))
        assert torch.equal(to_torch(part, "F32"), stack.permute(2, 0, 1)[expert, 1:3])


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor


def test_matrices_that_are_stored_transposed(plain, tmp_path, monkeypatch):
    state = {name: t.T.contiguous().T if t.ndim == 2 else t for name, t in tensors(plain).items()}
    old = as_bin(plain, tmp_path / "old", state)
    monkeypatch.setattr(rules, "MAX_CELL_BYTES", 1000)  # read by rows
    verify(str(plain), str(old))


def test_a_quantised_model(tmp_path):
    source = make_model(tmp_path / "hf", "llama31", quantized=Fp8((32, 48)))
    as_bin(source, tmp_path / "old")
    for name in ("hf", "old"):
        dequant(str(tmp_path / name), str(tmp_path / f"{name}-bf16"))
    assert files(tmp_path / "hf-bf16") == files(tmp_path / "old-bf16")


def test_other_protocols_of_pickle(plain, tmp_path):
    for protocol in (2, 3, 4):
        old = as_bin(plain, tmp_path / f"old{protocol}", pickle_protocol=protocol)
        verify(str(plain), str(old))


def test_safetensors_are_taken_where_both_are_there(plain, tmp_path):
    both = Path(shutil.copytree(plain, tmp_path / "both"))
    torch.save({"x": torch.ones(1)}, both / BIN)
    verify(str(plain), str(both))


# ---------------------------------------------------------------------------- shards without an index


def test_all_shards_without_an_index(tmp_path):
    for shards in (1, 3):
        source = make_model(tmp_path / f"hf{shards}", "llama31", quantized=False, shards=shards)
        bare = Path(shutil.copytree(source, tmp_path / f"bare{shards}"))
        (bare / "model.safetensors.index.json").unlink()
        verify(str(source), str(bare))
        assert inspect(str(bare)).whole and inspect(str(bare)).checked == "config.json"
    (tmp_path / "bare3" / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(DataError, match=r"tell of model-00001-of-00003\.safetensors, which is missing"):
        import_checkpoint(str(tmp_path / "bare3"), str(tmp_path / "out"))


def test_a_shard_of_a_billion(plain, tmp_path):
    bare = without_weights(plain, tmp_path / "bare")
    shutil.copy(plain / "model-00001-of-00001.safetensors", bare / "model-00001-of-1000000000.safetensors")
    with pytest.raises(DataError, match="a model has at most 100,000 files"):
        import_checkpoint(str(bare), str(tmp_path / "out"))


# ---------------------------------------------------------------------------- what is refused


def test_a_file_of_torch_before_1_6_and_the_command_that_converts_it(plain, tmp_path):
    old = as_bin(plain, tmp_path / "old", _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"written by torch before 1\.6; convert it with: python -c ") as error:
        import_checkpoint(str(old), str(tmp_path / "out"))
    code = str(error.value).partition('python -c "')[2].rstrip('"')
    import sys

    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    verify(str(plain), str(old))


class Call:
    """Pickled as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


def marked(folder: Path) -> tuple[Path, list[object]]:
    """(a file that must not be made, calls that would make it)."""
    file = folder / "was-run"
    return file, [
        Call(os.system, f"touch {file}"),
        Call(eval, f"open({str(file)!r}, 'w')"),
        Call(exec, f"open({str(file)!r}, 'w')"),
        Call(subprocess.call, ["touch", str(file)]),
        Call(getattr, "text", "upper"),
        Call(torch.load, str(file)),
        Call(io.open, str(file), "w"),
    ]


def test_a_pointer_of_git_lfs_and_a_pipe_are_named(plain, tmp_path):
    old = without_weights(plain, tmp_path / "old")
    (old / BIN).write_text(POINTER)
    with pytest.raises(DataError, match="is not the file itself but Git LFS's pointer to it; get the file with"):
        import_checkpoint(str(old), str(tmp_path / "out"))
    (old / BIN).unlink()
    os.mkfifo(old / BIN)
    with pytest.raises(DataError, match="not a file but a device, a pipe or a folder"):
        import_checkpoint(str(old), str(tmp_path / "out"))


def test_no_code_in_the_pickle_is_run(plain, tmp_path):
    file, calls = marked(tmp_path)
    for number, call in enumerate(calls):
        for place, state in enumerate(({**tensors(plain), "x": call}, call, {"x": [call]})):
            old = as_bin(plain, tmp_path / f"old{number}{place}", state)
            for command in (import_checkpoint, lambda path, _: inspect(path)):
                with pytest.raises(DataError, match="nothing in the file is run") as error:
                    command(str(old), str(tmp_path / "out"))
                assert "\n" not in str(error.value) and "safetensors" in str(error.value)
            assert not file.exists()


def rewritten(plain: Path, folder: Path, pickled: bytes) -> Path:
    """A model whose file has another pickle."""
    old = as_bin(plain, folder)
    entries = {}
    with zipfile.ZipFile(old / BIN) as zipped:
        entries = {name: zipped.read(name) for name in zipped.namelist()}
    with zipfile.ZipFile(old / BIN, "w") as zipped:
        for name, content in entries.items():
            zipped.writestr(name, pickled if name.endswith("data.pkl") else content)
    return old


PICKLES = {
    "instructions that objects are made with": b"\x80\x02cbuiltins\nobject\n)\x81.",
    "instances": b"(ibuiltins\nlist\n.",
    "extensions": b"\x80\x02\x82\x01.",
    "a bytearray of a terabyte": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "text of a terabyte": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b".",
    "a memo of a billion": b"\x80\x02}r\xff\xff\xff\x3fK\1K\1s.",
    "a set": b"\x80\x04\x8f.",
    "attributes of our functions": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\1\0\0\0aK\1sb.",
    "a dictionary of tuples of tuples": b"\x80\x02}(K\1\x85" + b"2\x86" * 60 + b"K\1u.",
    "an ordered dictionary with items": b"\x80\x02ccollections\nOrderedDict\n(](](K\1\x85K\1eetR.",
    "no dictionary": b"\x80\x02K\1.",
    "numbers as names": b"\x80\x02}K\1K\1s.",
    "cut off": b"\x80\x02}",
    "nothing": b"",
    "no tensor": b"\x80\x02}X\1\0\0\0aK\1s.",
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_of_other_kinds(case, plain, tmp_path):
    old = rewritten(plain, tmp_path / "old", PICKLES[case])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as error:
        pytorch_bin.read_header(old / BIN)
    assert "\n" not in str(error.value) and BIN in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# (offset, shape, strides) of a tensor of 20 float32 that lead outside of it, or make it larger than it is.
OUTSIDE = [
    (0, (21,), (1,)), (1, (20,), (1,)), (0, (4, 5), (6, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (1 << 62, (1,), (1,)),
    (0, (1 << 50,), (0,)), (0, (21,), (0,)), (0, (2, 2), (1,)), (0, (2.0,), (1,)), (True, (1,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("place", OUTSIDE)
def test_tensors_that_lead_outside(place, tmp_path):
    torch.save({"a": torch.ones(20)}, tmp_path / BIN)
    with zipfile.ZipFile(tmp_path / BIN) as zipped:
        name = next(name for name in zipped.namelist() if name.endswith("data.pkl"))
        entries = {entry: zipped.read(entry) for entry in zipped.namelist()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 20) if value == "the storage" else None

    buffer = io.BytesIO()
    call = Call(torch._utils._rebuild_tensor_v2, "the storage", *place, False, OrderedDict())
    Pickler(buffer, 2).dump({"a": call})
    entries[name] = buffer.getvalue()
    with zipfile.ZipFile(tmp_path / BIN, "w") as zipped:
        for entry, content in entries.items():
            zipped.writestr(entry, content)
    with pytest.raises(DataError, match="not a state dict of torch, or damaged"):
        pytorch_bin.read_header(tmp_path / BIN)


def test_compressed_and_big_endian_archives(plain, tmp_path):
    old = as_bin(plain, tmp_path / "old")
    with zipfile.ZipFile(old / BIN) as zipped:
        entries = {name: zipped.read(name) for name in zipped.namelist()}
    with zipfile.ZipFile(old / BIN, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in entries.items():
            zipped.writestr(name, content)
    with pytest.raises(DataError, match="not a state dict of torch, or damaged"):
        read_folder(old)
    with zipfile.ZipFile(old / BIN, "w") as zipped:
        for name, content in entries.items():
            zipped.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(DataError, match="big-endian"):
        read_folder(old)


def test_three_hundred_mutations(plain, tmp_path):
    """Random bytes changed, cut or inserted: an answer or one clear line."""
    old = as_bin(plain, tmp_path / "old")
    rng, original = random.Random(0), (old / BIN).read_bytes()
    refused = 0
    for _ in range(300):
        start = rng.choice([0, len(original) - 4000])  # the pickle, or the directory of the zip file
        (old / BIN).write_bytes(original[:start] + mutate(original[start:], rng))
        try:
            pytorch_bin.read_header(old / BIN)
        except SlipwayError as error:
            refused += 1
            assert "\n" not in str(error) and error.exit_code == 65
    assert refused > 100


# ---------------------------------------------------------------------------- from the hub


def test_old_files_are_fetched_only_where_there_are_no_safetensors(slipway, hub, env, plain, tmp_path):  # noqa: F811
    old = as_bin(plain, tmp_path / "old")
    hub.files[BIN] = (old / BIN).read_bytes()
    assert slipway("inspect", f"hf://{REPOSITORY}", env=env).returncode == 0
    assert not hub.got(BIN)
    hub.files = {file.name: file.read_bytes() for file in old.iterdir()} | {"training_args.bin": b"a pickle"}
    own = env | {"HF_HOME": str(tmp_path / "other")}
    done = slipway("import", f"hf://{REPOSITORY}", tmp_path / "nemo", env=own)
    assert done.returncode == 0, done.stderr
    assert hub.got(BIN) and not hub.got("training_args.bin")
    verify(str(plain), str(tmp_path / "nemo"))
    offline = own | {"HF_HUB_OFFLINE": "1"}
    assert slipway("inspect", f"hf://{REPOSITORY}", env=offline).returncode == 0


def test_an_index_beside_the_files(plain, tmp_path):
    """The index of an older release, with its files."""
    state = tensors(plain)
    old = without_weights(plain, tmp_path / "old")
    names = sorted(state)
    halves = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: state[name].clone() for name in part}, old / file)
    where = {name: file for file, part in halves.items() for name in part}
    (old / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    verify(str(plain), str(old))
    assert load_file(plain / "model-00001-of-00001.safetensors").keys() == where.keys()
