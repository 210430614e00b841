"""Good inputs of every reader, small ones, for tests/fuzz.py to spoil."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import shutil
from pathlib import Path

import torch
import yaml
from checkpoint import classic_models
from conftest import write_torch_dist
from safetensors.torch import load_file, save_file
from slipway import cli
from slipway.checkpoint import nf4
from slipway.families import FAMILIES, fabricate
from slipway.tokens.inputs import CUT

TEXT = ["some words of a text"] * 20
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def make_seeds(folder: Path) -> None:
    """Good inputs of every reader, each in a folder of its own."""
    fabricate.fabricate(folder / "hf", FAMILIES["qwen3"].tiny_config(), TEXT, quantized=False)
    command("import", folder / "hf", folder / "nemo")
    (folder / "hf" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8", "group_size": 128}}')
    shutil.copytree(folder / "hf", folder / "begun" / "hf")
    partial = folder / "begun" / ".out.partial"
    partial.mkdir()
    (partial / "journal").write_text("0\n1\n2\n")
    (partial / "plan.json").write_text("0" * 64)
    (folder / "run").mkdir()
    (folder / "run" / "recipe.json").write_text(json.dumps({"model": "m", "data": "d", "out": "o", "steps": 3}))
    (folder / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 3, "loss": 0.5}))
    entry = {"step": 1, "loss": 0.5, "lr": 0.1, "tokens_per_second": 9.0, "seconds": 1.5}
    (folder / "run" / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    (folder / "run" / "owner.json").write_text(json.dumps({"host": "h", "pid": 1, "started": "now", "job": "3"}))
    (folder / "packets").mkdir()
    (folder / "packets" / "greeting").write_text(json.dumps({"nonce": "0" * 32, "proof": "0" * 64}) + "\n")
    (folder / "packets" / "report").write_text("{}")
    make_models(folder)
    make_data(folder)
    make_megatron(folder)
    make_cluster(folder)


def make_models(folder: Path) -> None:
    """Models in other forms, and what is put on them."""
    from slipway.training.heads import DecodingHeads

    hf = folder / "hf"
    fabricate.fabricate(folder / "mxfp4", FAMILIES["gpt_oss"].tiny_config(), TEXT, quantized=True)
    fabricate.fabricate(folder / "fp8", FAMILIES["deepseek_v3"].tiny_config(), TEXT, quantized=True, shards=2)
    shutil.copytree(hf, folder / "bin", ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    state = tensors_of(hf)
    torch.save(state, folder / "bin" / "pytorch_model.bin")
    (folder / "old-bin").mkdir()
    shutil.copyfile(hf / "config.json", folder / "old-bin" / "config.json")
    torch.save(state, folder / "old-bin" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    adapter = folder / "adapted" / "adapter"
    adapter.mkdir(parents=True)
    shutil.copytree(hf, folder / "adapted" / "hf")
    out, into = state["model.layers.0.self_attn.q_proj.weight"].shape
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    parts = {f"{prefix}A.weight": torch.ones(2, into), f"{prefix}B.weight": torch.ones(out, 2)}
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    config |= {"layers_to_transform": [0], "base_model_name_or_path": "x", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for name, parts in (("done", ("mxfp4",)), ("both", ("hf", "nemo")), ("heads", ("hf",)), ("recipe", ("nemo",))):
        for part in parts:
            shutil.copytree(folder / part, folder / name / part)
    command("dequant", folder / "done" / "mxfp4", folder / "done" / "out")
    trained = folder / "heads" / "trained"
    size = json.loads((hf / "config.json").read_text())["hidden_size"]
    weights = DecodingHeads(size).bfloat16().state_dict()
    write_torch_dist(trained / "weights", {f"adapter.{name}": tensor for name, tensor in weights.items()})
    (trained / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(folder / "nemo")}))
    (trained / "context").mkdir()
    shutil.copyfile(folder / "nemo" / "context" / "hf_config.json", trained / "context" / "hf_config.json")
    command("extract-heads", trained, folder / "heads" / "heads")


def make_data(folder: Path) -> None:
    """Data in every form that is read, and a recipe."""
    import pyarrow
    import pyarrow.parquet
    from slipway.training.recipes import FOLDER

    data = folder / "tables" / "data"
    data.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{"text": "some words of a text"}] * 5)
    pyarrow.parquet.write_table(table, data / "a.parquet")
    with pyarrow.ipc.new_file(data / "a.arrow", table.schema) as file:
        file.write_table(table)
    lines = b'{"text": "some words of a text"}\n' * 5
    (data / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(data / "a.jsonl.zst"), "zstd") as packed:
        packed.write(lines)
    (data / "a.txt").write_text("some words of a text\n" * 5)
    rows = folder / "rows" / "data"
    rows.mkdir(parents=True)
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": []}
    (rows / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 3)
    (rows / "a.csv").write_text('prompt,completion\na,b\n"c\n",d\n')
    (rows / "a.json").write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 3))
    for place in (folder / "tables" / "tok", folder / "rows" / "tok"):
        place.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(folder / "hf" / name, place / name)
        words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        (place / "chat_template.jinja").write_text(words)
        (place / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|return|>"}}))
    carded = folder / "carded"
    shutil.copytree(folder / "rows" / "tok", carded / "tok")
    (carded / "data" / "a").mkdir(parents=True)
    shutil.copyfile(rows / "chats.jsonl", carded / "data" / "a" / "chats.jsonl")
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": ["a/*"]}]}]
    (carded / "data" / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\nwords\n")
    unfinished = carded / ".o.jsonl.partial"
    unfinished.mkdir()
    journal = {
        "cut": CUT,
        "identity": {},
        "sizes": {"content": 0, "lengths": 0, "ends": 0},
        "pieces": 1,
        "counts": {"rows": 3},
    }
    (unfinished / "journal.json").write_text(json.dumps(journal))
    (folder / "tokens").mkdir()
    said = ["--tokenizer", folder / "hf", "--show", 0]
    command("preprocess", data / "a.txt", folder / "tokens" / "a.bin", *said)
    sample = json.dumps({"inputs": {"p_ids": [1, 2], "r_ids": [3, 4, 5]}}) + "\n"
    for file in (folder / "tokens" / "b.jsonl", folder / "recipe" / "data.jsonl"):
        file.write_text(sample * 8)
    shutil.copyfile(FOLDER / "qwen3_30b_a3b.toml", folder / "recipe" / "own.toml")


def make_megatron(folder: Path) -> None:
    """Checkpoints as Megatron-LM, MindSpeed-LLM, Megatron-Bridge and NeMo leave them."""
    hf = folder / "hf"
    ranks = ("--tensor-parallel-size=2", "--expert-parallel-size=2")
    command("import", hf, folder / "classic", "--format=classic", *ranks)
    args = make_megatron_lm(folder)
    t8 = classic_models.write_model("t8", folder / "mindspeed" / "hf")
    command("import", t8, folder / "t8", "--format=classic", "--tensor-parallel-size=2")
    classic_models.as_mindspeed(folder / "t8", folder / "mindspeed" / "ckpt")
    classic_models.as_mindspeed(folder / "t8", folder / "tuned" / "ckpt", with_adapters)
    shutil.copytree(t8, folder / "tuned" / "hf")
    for form in ("bitsandbytes", "npu"):
        command("import", hf, folder / f"nf4-{form}", "--format=classic", "--qlora-nf4", form)
    bridge = folder / "bridge"
    command("import", hf, bridge, "--format=bridge")
    config = bridge / "iter_0000000" / "run_config.yaml"
    config.write_text(yaml.safe_dump(json.loads(config.read_text())))
    shutil.copytree(bridge, folder / "dist")
    (folder / "dist" / "iter_0000000" / "run_config.yaml").unlink()
    torch.save({"args": args, "checkpoint_version": 3.0}, folder / "dist" / "iter_0000000" / "common.pt")
    made = ("hf_config.json", "hf_files", "nemo_tokenizer")
    shutil.copytree(folder / "nemo", folder / "made", ignore=shutil.ignore_patterns(*made))
    shutil.copytree(folder / "made", folder / "recipe" / "made")
    make_lora(folder)
    make_packed(folder)


def make_megatron_lm(folder: Path) -> argparse.Namespace:
    """The classic checkpoint as Megatron-LM saves it, with nothing of Slipway's; its arguments."""
    args = argparse.Namespace()
    for file in (folder / "classic").rglob("*.pt"):
        saved = classic_models.load(file)
        args = saved["args"] = argparse.Namespace(**vars(saved["args"]), attention_backend=torch.bfloat16)
        for name, zipped in (("lm", True), ("old", False)):
            target = folder / name / file.relative_to(folder / "classic")
            target.parent.mkdir(parents=True)
            more = {"rng_state": [torch.zeros(3)], "optimizer": {"param_groups": [{"lr": 0.1}]}}
            torch.save({**saved, **more}, target, _use_new_zipfile_serialization=zipped)
    return args


def with_adapters(_: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A rank's tensors with adapters on the output of attention."""
    found = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        if not name.endswith("linear_proj.weight"):
            found[name] = tensor
            continue
        found[f"{stem}.base_layer.weight"] = tensor
        found[f"{stem}.lora_A.default.weight"] = torch.ones(4, tensor.shape[1], dtype=torch.bfloat16)
        found[f"{stem}.lora_B.default.weight"] = torch.ones(tensor.shape[0], 4, dtype=torch.bfloat16)
    return found


def make_lora(folder: Path) -> None:
    """Low-rank adapters as NeMo trains them."""
    lora, stem = folder / "lora" / "ckpt", "decoder.layers.self_attention.linear_proj.adapter"
    shutil.copytree(folder / "nemo", folder / "lora" / "nemo")
    config = json.loads((folder / "hf" / "config.json").read_text())
    layers, out = config["num_hidden_layers"], config["hidden_size"]
    sizes = {"in": (layers, 4, config["num_attention_heads"] * config["head_dim"]), "out": (layers, out, 4)}
    tensors = {f"{stem}.linear_{side}.weight": torch.ones(size).bfloat16() for side, size in sizes.items()}
    write_torch_dist(lora / "weights", tensors)
    (lora / "weights" / "adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(folder / "nemo")}))
    (lora / "context").mkdir()
    about = {"_target_": "nemo.collections.llm.peft.LoRA", "alpha": 8, "dim": 4, "target_modules": ["linear_proj"]}
    (lora / "context" / "model.yaml").write_text(yaml.safe_dump({"model_transform": about}))


def make_packed(folder: Path) -> None:
    """A model of Hugging Face in bitsandbytes' NF4."""
    packed = {}
    kinds = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
    for name, tensor in tensors_of(folder / "hf").items():
        if not name.endswith("proj.weight"):
            packed[name] = tensor
            continue
        for suffix, (elements, dtype) in nf4.pack(tensor.view(torch.uint16).numpy(), "bitsandbytes").items():
            packed[name + suffix] = torch.from_numpy(elements.copy()).view(kinds[dtype])
    shutil.copytree(folder / "hf", folder / "bnb", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(packed, folder / "bnb" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "hf" / "config.json").read_text())
    (folder / "bnb" / "config.json").write_text(json.dumps({**config, "quantization_config": NF4}))


def make_cluster(folder: Path) -> None:
    """The files of a cluster, and what one answers."""
    page = (Path(__file__).parents[1] / "docs" / "launching.md").read_text()
    (folder / "cluster").mkdir()
    (folder / "cluster" / "lab.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    status = {"state": "running", "step": 3, "steps": 9, "loss": 0.5, "updated": "2026-11-26T05:00:00Z"}
    (folder / "cluster" / "status.json").write_text(json.dumps(status))
    records = ["run 20261126-1", "now 1795672000", "meta x 2", "step 1-import 77 0/1795661678   ", "sacct 78 RUNNING"]
    records += ["queue 2-train RUNNING None n1 1:00 2:00 N/A", "step 2-train 78   2", "progress 2-train /out STATUS"]
    lines = [record.replace(" ", "\t").replace("/1", " 1") for record in records]
    (folder / "cluster" / "answer.tsv").write_text("\n".join(lines))


def tensors_of(model: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model of Hugging Face."""
    return {name: tensor for file in model.glob("*.safetensors") for name, tensor in load_file(file).items()}


def command(*words: object) -> None:
    """A command that must end well; it prints nothing."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main([*map(str, words)])
    assert code == 0, (words, said.getvalue())
