"""dequant, import, export and the heads, through their commands' functions, on a tiny gpt-oss."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import config_of, make_model, saved, tensor_of, write_torch_dist
from safetensors.torch import load_file, save_file
from slipway.checkpoint import huggingface, torch_dist
from slipway.commands.dequant import dequant
from slipway.commands.export import export
from slipway.commands.extract_heads import extract_heads
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.commands.merge_heads import merge_heads
from slipway.errors import DataError
from slipway.families import FAMILIES
from slipway.tensors.bits import to_torch
from slipway.tensors.refs import TORCH_NAMES, Ref


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def bf16_model(mxfp4_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bf16") / "model"
    dequant(str(mxfp4_model), str(folder), shard_size="200KB")
    return folder


def test_dequant_writes_a_whole_model(mxfp4_model, bf16_model):
    index = json.loads((bf16_model / "model.safetensors.index.json").read_text())
    found = tensors(bf16_model)
    assert set(index["weight_map"]) == set(found) and len(set(index["weight_map"].values())) >= 3
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    config = json.loads((bf16_model / "config.json").read_text())
    source = json.loads((mxfp4_model / "config.json").read_text())
    assert source.pop("quantization_config") and config == source
    kept = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")
    assert all((bf16_model / name).read_bytes() == (mxfp4_model / name).read_bytes() for name in kept)
    for file in bf16_model.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_dequantised_experts_are_what_transformers_makes_of_them(mxfp4_model, bf16_model):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source, found = tensors(mxfp4_model), tensors(bf16_model)
    names = [name.removesuffix("_blocks") for name in source if name.endswith("_blocks")]
    assert len(names) == 4
    for name in names:
        assert torch.equal(found[name], convert_moe_packed_tensors(source[f"{name}_blocks"], source[f"{name}_scales"]))


def test_import_from_mxfp4_is_import_from_bf16(mxfp4_model, bf16_model, tmp_path):
    import_checkpoint(str(mxfp4_model), str(tmp_path / "a"))
    import_checkpoint(str(bf16_model), str(tmp_path / "b"))
    found = [files(tmp_path / name) for name in "ab"]
    configs = [json.loads(content.pop("context/hf_config.json")) for content in found]
    assert [config.pop("_name_or_path") for config in configs] == [str(mxfp4_model), str(bf16_model)]
    assert configs[0] == configs[1] and found[0] == found[1]


def test_export_gives_back_what_was_imported(bf16_model, tmp_path):
    import_checkpoint(str(bf16_model), str(tmp_path / "nemo"))
    export(str(tmp_path / "nemo"), str(tmp_path / "hf"), shard_size="200KB")
    assert files(tmp_path / "hf") == files(bf16_model)
    export(str(tmp_path / "nemo" / "weights"), str(tmp_path / "again"), shard_size="200KB")
    assert files(tmp_path / "again") == files(bf16_model)


COMMON = {
    "hidden_size": 256, "vocab_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64,
}  # fmt: skip
DEEPSEEK = {
    "intermediate_size": 512, "moe_intermediate_size": 256, "q_lora_rank": 128, "kv_lora_rank": 128,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 4, "n_shared_experts": 1,
}  # fmt: skip
# The models of the golden lists, which NeMo saved on a GPU, with Transformer Engine.
GOLDEN = {
    "gpt_oss": {"intermediate_size": 256, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "llama31": {"intermediate_size": 512},
    "qwen3": {"moe_intermediate_size": 256},
    "deepseek_v3": {**DEEPSEEK, "num_nextn_predict_layers": 0},
    "deepseek_v3_mtp": DEEPSEEK,
}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_checkpoint_has_the_keys_that_megatron_wrote(name):
    golden = json.loads((Path(__file__).parent / "golden" / f"{name}.json").read_text())
    family = FAMILIES[name.removesuffix("_mtp")]
    model = family.rules({**family.tiny_config(), **COMMON, **GOLDEN[name]})
    chunks = Counter(ref.name for cell in model.cells for ref in cell.megatron)
    found = {
        key: {"shape": list(info.shape), "chunks": chunks[key], "dtype": TORCH_NAMES[info.dtype]}
        for key, info in model.megatron.items()
    }
    assert found == golden["tensors"]
    assert sorted(model.extra_state) == golden["extra_state"]


def test_torchs_own_reader_reads_the_checkpoint(nemo_model):
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    loaded = _load_state_dict_from_keys(storage_reader=FileSystemReader(nemo_model / "weights"))
    own = torch_dist.Reader(nemo_model)
    plain = {key.removeprefix("module."): t for key, t in loaded.items() if isinstance(t, torch.Tensor)}
    assert plain.keys() == own.tensors.keys()
    assert all(torch.equal(tensor_of(own, key), tensor) for key, tensor in plain.items())


Cut = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
WHOLE = torch.arange(6 * 8 * 5, dtype=torch.float32).view(6, 8, 5)


def write_chunks(folder: Path, cuts: list[Cut]) -> None:
    """A checkpoint of WHOLE under the key x, cut into these chunks."""
    from torch.distributed.checkpoint import metadata as dcp
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    chunks, storage, content = [], {}, b""
    for offsets, extent in cuts:
        blob = saved(WHOLE[tuple(slice(o, o + s) for o, s in zip(offsets, extent, strict=True))])
        chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(extent)))
        index = dcp.MetadataIndex("module.x", torch.Size(offsets))
        storage[index] = _StorageInfo("__0_0.distcp", len(content), len(blob))
        content += blob
    entry = dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=torch.float32), WHOLE.size(), chunks)
    (folder / "__0_0.distcp").write_bytes(content)
    (folder / ".metadata").write_bytes(pickle.dumps(dcp.Metadata({"module.x": entry}, storage_data=storage)))


def test_the_reader_joins_chunks_however_they_were_cut(tmp_path):
    """A tensor that torch saved in pieces of its own, read by parts that do not follow them."""
    write_chunks(tmp_path, [((a, b, 0), (2, 4, 5)) for a in (0, 2, 4) for b in (0, 4)])
    reader = torch_dist.Reader(tmp_path)
    for ref in (Ref("x"), Ref("x", (3,)), Ref("x", (), (1, 5)), Ref("x", (5,), (3, 6)), Ref("x", (2, 7))):
        part = WHOLE[ref.index]
        found = to_torch(reader.read(ref), "F32")
        assert torch.equal(found, part if ref.rows is None else part[slice(*ref.rows)])


@pytest.mark.parametrize(
    "cuts",
    [
        [((0, 0, 0), (2, 8, 5)), ((4, 0, 0), (2, 8, 5))],
        [((0, 0, 0), (3, 8, 5)), ((3, 0, 0), (3, 8, 4))],
        [((0, 0, 0), (4, 8, 5)), ((1, 0, 0), (2, 8, 5))],  # as many elements as the tensor has, some of them twice
    ],
    ids=["a hole", "a hole at the edge", "a hole and an overlap"],
)
def test_a_tensor_with_holes_is_refused(cuts, tmp_path):
    """Not filled with what the memory held before."""
    write_chunks(tmp_path, cuts)
    reader = torch_dist.Reader(tmp_path)
    with pytest.raises(DataError, match="the chunks of tensor x leave gaps or overlap; copy the checkpoint again"):
        reader.read(Ref("x"))
    assert torch.equal(to_torch(reader.read(Ref("x", (), (0, 1))), "F32"), WHOLE[:1]), "this part is all there"


def test_metadata_runs_no_foreign_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/boom",)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(Exception, match="is damaged"):
        torch_dist.Reader(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_the_source_is_not_touched(mxfp4_model, tmp_path):
    model = tmp_path / "source"
    shutil.copytree(mxfp4_model, model)
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in model.iterdir()}
    dequant(str(model), str(tmp_path / "bf16"))
    import_checkpoint(str(model), str(tmp_path / "nemo"))
    assert {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in model.iterdir()} == before


def test_a_bf16_model_is_not_dequantised(tmp_path, slipway):
    make_model(tmp_path / "bf16", quantized=False)
    done = slipway("dequant", tmp_path / "bf16", tmp_path / "out")
    assert done.returncode == 65 and "nothing to do" in done.stderr and not (tmp_path / "out").exists()


def test_a_tied_model_may_store_its_embedding_twice(tmp_path):
    model = make_model(tmp_path / "once", "qwen3_dense_tied", quantized=False, shards=1)
    import_checkpoint(str(model), str(tmp_path / "a"))
    (file,) = model.glob("*.safetensors")
    stored = load_file(file)
    save_file({**stored, "lm_head.weight": stored["model.embed_tokens.weight"].clone()}, file)
    edit = json.loads((model / huggingface.INDEX).read_text())
    edit["weight_map"]["lm_head.weight"] = file.name
    (model / huggingface.INDEX).write_text(json.dumps(edit))
    import_checkpoint(str(model), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_floats_become_bfloat16(dtype, tmp_path):
    model = make_model(tmp_path / "model", "llama31", quantized=False, shards=1)
    (file,) = model.glob("*.safetensors")
    stored = {name: t.to(dtype) for name, t in load_file(file).items()}
    save_file(stored, file)
    import_checkpoint(str(model), str(tmp_path / "a"))
    save_file({name: t.bfloat16() for name, t in stored.items()}, file)
    import_checkpoint(str(model), str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe", "deepseek_v3", "qwen25_tied", "llama31"])
def test_heads_keep_their_dtype_and_are_merged_in_bfloat16(kind, dtype, tmp_path):
    from slipway.training.heads import DecodingHeads

    heads = {name: t.to(dtype) for name, t in DecodingHeads(config_of(kind)["hidden_size"]).state_dict().items()}
    write_torch_dist(tmp_path / "ckpt" / "weights", {f"adapter.{name}": t for name, t in heads.items()})
    extract_heads(str(tmp_path / "ckpt"), str(tmp_path / "heads"))
    stored = load_file(tmp_path / "heads" / "heads.safetensors")
    assert all(torch.equal(stored[name], t) and stored[name].dtype == dtype for name, t in heads.items())
    base = make_model(tmp_path / "base", kind, quantized=False)
    merge_heads(str(tmp_path / "heads"), str(base), str(tmp_path / "merged"))
    merged = tensors(tmp_path / "merged")
    assert all(torch.equal(merged.pop(name), t.bfloat16()) for name, t in heads.items())
    plain = tensors(base)
    assert merged.keys() == {f"llm.{name}" for name in plain}
    assert all(torch.equal(merged[f"llm.{name}"], t) for name, t in plain.items())


NO_TORCH = """
import sys
from slipway import cli
code = cli.main(sys.argv[1:])
assert not {"torch", "transformers", "nemo", "megatron"} & sys.modules.keys()
sys.exit(code)
"""


def test_no_command_here_needs_torch(mxfp4_model, nemo_model, tmp_path):
    """Where no GPU is: they begin at once, and take little memory."""
    heads = tmp_path / "heads" / "weights"
    write_torch_dist(heads, {f"adapter.{n}": torch.zeros(shape) for n, shape in head_shapes().items()})
    for words in (["dequant", mxfp4_model], ["import", mxfp4_model], ["export", nemo_model], ["extract-heads", heads]):
        command = [sys.executable, "-c", NO_TORCH, *map(str, words), str(tmp_path / words[0])]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (words, done.stderr)


def head_shapes() -> dict[str, torch.Size]:
    from slipway.training.heads import DecodingHeads

    return {name: t.shape for name, t in DecodingHeads(64).state_dict().items()}
