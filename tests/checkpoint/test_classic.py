"""Megatron's classic layout: byte for byte what MindSpeed-LLM wrote, read back, and refused where it does not fit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import classic_models
import numpy as np
import pytest
import torch
import yaml
from conftest import make_model
from safetensors.torch import load_file
from slipway import cli
from slipway.checkpoint import classic, classic_files, nf4, torch_files
from slipway.errors import DataError
from slipway.families import FAMILIES, understood
from slipway.tensors.refs import TensorInfo

GOLDEN = json.loads((Path(__file__).parent / "golden" / "classic.json").read_text())
WRITTEN = sorted(name for name, case in GOLDEN.items() if "adapters" not in case)
TRAINED = sorted(name for name, case in GOLDEN.items() if "adapters" in case)
FORMS = {"bitsandbytes": "bitsandbytes", "bitsandbytes-npu-beta": "npu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = classic_models.write_model(name, root / name)
        return made[name]

    return of


def run(*words: object) -> None:
    assert cli.main([*map(str, words)]) == 0


def refused(capsys, *words: object) -> str:
    """The line with which a command refuses."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) in (2, 65)
    err = capsys.readouterr().err.strip().splitlines()
    return err[-1]


def flags_of(case: dict[str, Any]) -> list[str]:
    return [*classic_models.flags(case["options"], FORMS.get(case.get("nf4", ""), ""))]


def written(checkpoint: Path, ours: bool = True) -> dict[str, dict[str, str]]:
    """Folder of a rank → chunk → digest of its tensors."""
    found: dict[str, dict[str, str]] = {}
    for file in (checkpoint / "iter_0000001").rglob("*.pt"):
        saved = classic_models.load(file, ours=ours)
        chunks = {key: value for key, value in saved.items() if key.startswith("model")}
        found[file.parent.name] = {key: classic_models.digest(value) for key, value in chunks.items()}
    return found


@pytest.mark.parametrize("name", WRITTEN)
def test_the_bytes_that_mindspeed_writes(name, models, tmp_path):
    case = GOLDEN[name]
    source = models(case["model"])
    run("import", source, tmp_path / "out", "--format", "classic", *flags_of(case))
    assert written(tmp_path / "out") == case["files"]
    assert (tmp_path / "out" / classic.TRACKER).read_text() == "1"
    # The same files as MindSpeed saves them say nothing of model and layout: the flags do.
    theirs = classic_models.as_mindspeed(tmp_path / "out", tmp_path / "theirs")
    cut = "first-k-dense-replace" in case["options"]
    for checkpoint, words in ((tmp_path / "out", []), (theirs, [*flags_of(case), "--config", source])):
        back = tmp_path / f"{checkpoint.name}-hf"
        run("export", checkpoint, back, *words)
        if "nf4" not in case and not cut:
            run("verify", source, back)
    if cut:
        assert_cut_to(source, tmp_path / "theirs-hf", [0, *range(3, 8)])
    left, right = (load_file(tmp_path / f"{one}-hf" / "model.safetensors") for one in ("out", "theirs"))
    assert classic_models.digest(left) == classic_models.digest(right)


def assert_cut_to(source: Path, back: Path, layers: list[int]) -> None:
    before, after = load_file(source / "model.safetensors"), load_file(back / "model.safetensors")
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        assert torch.equal(tensor, before[".".join(parts)]), name
    config = json.loads((back / "config.json").read_text())
    assert config["num_hidden_layers"] == len(layers) and config["first_k_dense_replace"] == 1


@pytest.mark.parametrize("name", [name for name in WRITTEN if "dequantised" in GOLDEN[name]])
def test_what_packed_tensors_mean(name, models, tmp_path):
    case = GOLDEN[name]
    run("import", models(case["model"]), tmp_path / "out", "--format", "classic", *flags_of(case))
    for rank, chunks in case["dequantised"].items():
        file = tmp_path / "out" / "iter_0000001" / rank / classic.FILE
        saved = classic_models.load(file)
        for chunk, wanted in chunks.items():
            tensors = saved[chunk]
            packed = [key for key in tensors if f"{key}.absmax" in tensors]
            found = {key: unpacked(tensors, key) for key in packed}
            if case["nf4"] == "bitsandbytes":
                # bitsandbytes' code for AVX-512 takes the first block's scale for rows that are shorter than a block
                # and a multiple of 16; its other code does not. The golden data of such matrices are left out.
                found = {k: t for k, t in found.items() if t.shape[-1] % 16 or t.shape[-1] % 64 == 0}
            assert classic_models.digest(found) == wanted


def unpacked(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    held = {suffix: tensors[name + suffix] for suffix in ("", *nf4.PARTS) if name + suffix in tensors}
    infos = {s: TensorInfo(tuple(t.shape), classic_models.DTYPES[t.dtype]) for s, t in held.items()}

    def part(suffix: str, begin: int, end: int) -> np.ndarray:
        kinds = {torch.uint8: np.uint8, torch.float32: np.uint32, torch.bfloat16: np.uint16}
        whole = held[suffix].contiguous().reshape(-1)
        bits = whole.view(torch.uint8).numpy().view(kinds[whole.dtype])
        return bits[begin:end]

    source = nf4.source_of(infos, part, name, None)
    count = int(np.prod(source.shape))
    return torch.from_numpy(source.read(0, count)).view(torch.bfloat16).reshape(source.shape)


@pytest.mark.parametrize("name", TRAINED)
def test_adapters_that_mindspeed_trains(name, models, tmp_path):
    case = GOLDEN[name]
    source = models(case["model"])
    base, ours = tmp_path / "base", flags_of(case)
    run("import", source, base, "--format", "classic", *ours)
    trained = with_adapters(base, tmp_path / "trained", case)
    words = ["export", trained, tmp_path / "hf", "--config", source, *ours, "--lora-alpha", 8, "--lora-r", 4]
    words += {"apart": ["--base", base], "only": ["--adapter"], "inside": []}[case["adapters"]]
    run(*words)
    found = load_file(
        tmp_path / "hf" / ("adapter_model" if case["adapters"] == "only" else "model").__add__(".safetensors")
    )
    if case["adapters"] != "only":  # the golden data leave out what adapters leave alone
        before = load_file(source / "model.safetensors")
        found = {key: tensor for key, tensor in found.items() if not torch.equal(tensor, before[key])}
    assert classic_models.digest(found) == case["hf"]


def with_adapters(base: Path, out: Path, case: dict[str, Any]) -> Path:
    """A checkpoint with the golden data's adapters, as MindSpeed-LLM saves it; its bytes are compared with theirs."""
    layout = {name.replace("-", "_"): value for name, value in case["options"].items() if "lora" not in name}
    options = classic.Options(**layout)
    ranks = {classic.folder_of(rank, options): rank for rank in classic.ranks_of(options, experts=True)}

    def change(folder: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        adapters = classic_models.adapters_of(case["model"], ranks[folder], options)
        if case["adapters"] != "inside":
            return adapters
        stems = {name.split(".lora_")[0] for name in adapters}
        kept = {
            f"{stem}.base_layer.weight" if (stem := name.removesuffix(".weight")) in stems else name: tensor
            for name, tensor in tensors.items()
        }
        return kept | adapters

    made = classic_models.as_mindspeed(base, out, change)
    assert written(made, ours=False) == case["files"]
    return made


# ---------------------------------------------------------------------------- any sizes, any options


def random_case(random: random.Random) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(kind of model, changes of its config.json, options), such that everything divides."""
    kind = random.choice(["llama31", "qwen3_moe", "gpt_oss", "qwen25_tied", "deepseek_v3", "qwen3_dense", "moonlight"])
    tensor, stages = random.choice([1, 2]), random.choice([1, 2, 3])
    virtual = random.choice([None, 1, 2])
    layers = stages * (virtual or 1) * random.choice([1, 2])
    options: dict[str, Any] = {"tensor-parallel-size": tensor, "pipeline-parallel-size": stages}
    idle = 0
    if virtual and stages > 1:
        options["num-layers-per-virtual-pipeline-stage"] = virtual
        if layers > 2 and random.random() < 0.5:
            idle = 1
            options |= {"noop-layers": str(random.randrange(layers)), "num-layers": layers}
    elif stages > 1 and random.random() < 0.4:
        layers += 1
        counts = [layers // stages] * stages
        counts[random.randrange(stages)] += layers - sum(counts)
        options["num-layer-list"] = ",".join(map(str, counts))
    elif random.random() < 0.3:
        layers = 2 * stages * random.choice([1, 2])
        options["schedules-method"] = "dualpipev"
    changes: dict[str, Any] = {"num_hidden_layers": max(1, layers - idle)}
    if kind == "gpt_oss":
        changes["layer_types"] = (["sliding_attention", "full_attention"] * layers)[: changes["num_hidden_layers"]]
    experts = kind in ("qwen3_moe", "gpt_oss", "deepseek_v3", "moonlight")
    if kind in ("deepseek_v3", "moonlight"):
        changes["first_k_dense_replace"] = random.randrange(changes["num_hidden_layers"])
        changes["num_nextn_predict_layers"] = random.choice([0, 0, 1])
        if changes["num_nextn_predict_layers"]:
            options["mtp-num-layers"] = 1
        if kind == "deepseek_v3" and random.random() < 0.3:
            options["mla-mm-split"] = True
    if experts:
        options["expert-parallel-size"] = random.choice([1, 2])
        options |= {"moe-grouped-gemm": True} if random.random() < 0.5 else {}
        options |= random.choice([{}, {"moe-tp-extend-ep": True}, {"expert-tensor-parallel-size": 1}])
    return kind, changes, options


@pytest.mark.parametrize("seed", range(30))
def test_export_undoes_import(seed, tmp_path):
    kind, changes, options = random_case(random.Random(seed))
    source = make_model(tmp_path / "hf", kind, changes, quantized=False)
    run("import", source, tmp_path / "out", "--format", "classic", *classic_models.flags(options))
    assert_accounted(source, tmp_path / "out", options)
    run("export", tmp_path / "out", tmp_path / "back")
    before, after = (load_all(folder) for folder in (source, tmp_path / "back"))
    left_out = {name for name in before if name not in after}
    assert all(f"layers.{changes['num_hidden_layers']}." in name for name in left_out), sorted(left_out)[:3]
    assert classic_models.digest(after) == classic_models.digest({n: t for n, t in before.items() if n not in left_out})
    shutil.rmtree(tmp_path / "out" / classic_files.NOTE)  # args alone say the layout
    run("export", tmp_path / "out", tmp_path / "again", "--config", source)
    assert classic_models.digest(load_all(tmp_path / "again")) == classic_models.digest(after)


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_accounted(source: Path, checkpoint: Path, options: dict[str, Any]) -> None:
    """Every element of every rank's tensors has a place in the model, and is there once."""
    config = json.loads((checkpoint / classic_files.HF_NOTE / "config.json").read_text())
    family, known = understood(config, source / "config.json")
    given = classic.Options(**{name.replace("-", "_"): value for name, value in options.items()})
    mindspeed = classic.in_mindspeed(known)
    layout = classic.Layout(known, family.rules(known).megatron, given, mindspeed, in_one=mindspeed)
    filled = {
        (rank, chunk, name): 0
        for rank, chunks in layout.files.items()
        for chunk, held in chunks.items()
        for name in held
    }
    for (key, index), places in layout.places.items():
        whole = layout.tensors[key].shape[len(index) :]
        for place in places:
            filled[place.rank, place.chunk, place.name] += int(np.prod(place.cut.shape(whole) if whole else (1,)))
    for (rank, chunk, name), count in filled.items():
        assert count == np.prod(layout.files[rank][chunk][name].info.shape), (rank, chunk, name)
    for rank in layout.ranks:
        saved = torch_files.read_header(checkpoint / "iter_0000001" / classic.folder_of(rank, given) / classic.FILE)
        for chunk, held in layout.files[rank].items():
            found = {name: place.info for name, place in saved.chunks[chunk].items()}
            assert found == {name: tensor.info for name, tensor in held.items()}


# ---------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def split(models, tmp_path_factory) -> Path:
    """A checkpoint with two tensor ranks, two stages and two groups of experts."""
    out = tmp_path_factory.mktemp("split") / "out"
    words = ["--tensor-parallel-size", 2, "--pipeline-parallel-size", 2, "--expert-parallel-size", 2]
    run("import", models("t8"), out, "--format", "classic", *words)
    return out


@pytest.mark.parametrize(
    "words, said",
    [
        (["--tensor-parallel-size", 3], "cannot be divided by 3"),
        (["--expert-parallel-size", 3], "8 experts cannot be divided by 3"),
        (["--pipeline-parallel-size", 3], "8 layers cannot be divided by 3"),
        (["--pipeline-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 3], "cannot be divided by 3"),
        (["--num-layers", 9], "but the model has 8"),
        (["--noop-layers", "3,3"], "give different numbers"),
        (["--noop-layers", "3,x"], "give numbers with commas"),
        (["--pipeline-parallel-size", 2, "--num-layer-list", "5,4"], "with the sum 8"),
        (["--pipeline-parallel-size", 2, "--num-layer-list", "4,4", "--noop-layers", "1"], "leave out virtual stages"),
        (["--mtp-num-layers", 2], "but the model has 1"),
        (["--expert-tensor-parallel-size", 3], "must be 1 or the tensor parallel size"),
        (["--schedules-method", "dualpipe"], "dualpipev"),
        (["--pipeline-parallel-size", 3, "--schedules-method", "dualpipev"], "cannot be divided by 6"),
        (["--qlora-nf4", "nf3"], "bitsandbytes, npu"),
    ],
)
def test_what_does_not_divide_is_refused(words, said, models, tmp_path, capsys):
    line = refused(capsys, "import", models("t8"), tmp_path / "out", "--format", "classic", *words)
    assert said in line, line
    assert not (tmp_path / "out").exists()


def test_flags_are_held_against_the_files(split, models, tmp_path, capsys):
    theirs = classic_models.as_mindspeed(split, tmp_path / "theirs")
    line = refused(capsys, "export", theirs, tmp_path / "a")
    assert "does not say which model it is" in line and "--config" in line
    config = ["--config", models("t8")]
    for flag, said in (
        ("--moe-grouped-gemm", "is missing"),
        ("--mla-mm-split", "is missing"),
        ("--moe-tp-extend-ep", "local_experts"),
    ):
        assert said in refused(capsys, "export", theirs, tmp_path / "b", *config, flag)
    other = tmp_path / "other" / "config.json"
    other.parent.mkdir()
    other.write_text(json.dumps({**classic_models.config_of("t8"), "hidden_size": 64}))
    assert "but the layout needs" in refused(capsys, "export", theirs, tmp_path / "c", "--config", other)
    shutil.rmtree(theirs / "iter_0000001" / "mp_rank_01_001_001")
    assert "mp_rank_01_001_001 is missing" in refused(capsys, "export", theirs, tmp_path / "d", *config)


def test_copies_that_differ_between_ranks_are_named(split, models, tmp_path, capsys):
    def change(folder: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if folder == "mp_rank_01_000_001":
            tensors["decoder.layers.2.input_layernorm.weight"][3] += 1
        return tensors

    theirs = classic_models.as_mindspeed(split, tmp_path / "theirs", change)
    line = refused(capsys, "export", theirs, tmp_path / "out", "--config", models("t8"))
    assert "decoder.layers.2.input_layernorm.weight differs between mp_rank_00_000_000 and mp_rank_01_000_001" in line


def test_names_of_before_2025_07_are_read(split, models, tmp_path):
    new_to_old = {"q_up_proj": "qb", "kv_up_proj": "kvb", "kv_layernorm": "k_layernorm"}

    def change(folder: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {renamed(name): tensor for name, tensor in tensors.items()}

    def renamed(name: str) -> str:
        for new, old in new_to_old.items():
            name = name.replace(new, old)
        return name

    theirs = classic_models.as_mindspeed(split, tmp_path / "theirs", change)
    run("export", theirs, tmp_path / "out", "--config", models("t8"))
    run("verify", models("t8"), tmp_path / "out")


def test_adapters_that_are_incomplete(models, tmp_path, capsys):
    case = GOLDEN["lora_inside_tp1pp2ep2"]
    base = tmp_path / "base"
    run("import", models("t8"), base, "--format", "classic", *flags_of(case))
    trained = with_adapters(base, tmp_path / "trained", case)
    words = ["--config", models("t8"), *flags_of(case)]
    assert "give it with --lora-alpha" in refused(capsys, "export", trained, tmp_path / "a", *words)
    words += ["--lora-alpha", 8]
    assert "--lora-r is 8, but" in refused(capsys, "export", trained, tmp_path / "a", *words, "--lora-r", 8)
    for what, said in (("layers.1.mlp.linear_fc1.lora_", "are missing"), ("fc2.lora_B", "lora_B of")):

        def change(folder: str, tensors: dict[str, torch.Tensor], what: str = what) -> dict[str, torch.Tensor]:
            return {name: tensor for name, tensor in tensors.items() if what not in name}

        spoiled = classic_models.as_mindspeed(trained, tmp_path / said[:5], change)
        assert said in refused(capsys, "export", spoiled, tmp_path / "a", *words)
    assert "has no low-rank adapters" in refused(capsys, "export", base, tmp_path / "a", "--adapter", "--lora-alpha", 8)


def tuned(models: Any, folder: Path, change: Any) -> list[object]:
    """The words that export a checkpoint with adapters inside, of which every tensor was changed by this."""
    case = GOLDEN["lora_inside_tp1pp2ep2"]
    if not (folder / "base").exists():
        run("import", models("t8"), folder / "base", "--format", "classic", *flags_of(case))
        with_adapters(folder / "base", folder / "trained", case)
    shutil.rmtree(folder / "changed", ignore_errors=True)

    def of_rank(_: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {found[0]: found[1] for name, tensor in tensors.items() if (found := change(name, tensor))}

    changed = classic_models.as_mindspeed(folder / "trained", folder / "changed", of_rank)
    return ["export", changed, "--config", models("t8"), *flags_of(case), "--lora-alpha", 8]


def test_adapters_in_other_dtypes(models, tmp_path, capsys):
    """Their values, and so the merged model, are the same; of two dtypes in one checkpoint one is a mistake."""
    digests = set()
    for number, dtype in enumerate((torch.bfloat16, torch.float32, torch.float16)):
        words = tuned(models, tmp_path, lambda n, t, d=dtype: (n, t.to(d) if "lora_" in n else t))
        run(words[0], words[1], tmp_path / str(number), *words[2:])
        digests.add(classic_models.digest(load_all(tmp_path / str(number))))
    assert len(digests) == 1
    words = tuned(models, tmp_path, lambda n, t: (n, t.float() if "lora_A" in n else t))
    assert "must all be in one of" in refused(capsys, words[0], words[1], tmp_path / "out", *words[2:])


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda n, t: (n, t.T.contiguous() if "linear_proj.lora_A" in n else t), "have the shapes"),
        (lambda n, t: (n.replace("lora_A.default.weight", "lora_magnitude_vector.default.weight"), t), "is of DoRA"),
        (lambda n, t: (n.replace("lora_A.default", "adapter.linear_in"), t), "as NeMo and Megatron-Bridge name"),
        (lambda n, t: (n.replace("lora_A.default", "lora_C"), t), "unknown tensor"),
        (lambda n, t: (n, t[:0] if "lora_" in n else t), "have the shapes"),
    ],
    ids=["transposed", "DoRA", "NeMo's names", "unknown", "empty"],
)
def test_adapters_of_other_kinds_are_refused(change, said, models, tmp_path, capsys):
    words = tuned(models, tmp_path, change)
    assert said in refused(capsys, words[0], words[1], tmp_path / "out", *words[2:])


def test_verify_and_inspect_know_the_layout(split, models, capsys):
    run("verify", split, models("t8"))
    capsys.readouterr()
    run("inspect", split, "--json")
    said = json.loads(capsys.readouterr().out)
    assert said["format"] == "Megatron's classic layout" and said["model"] == "deepseek_v3" and said["whole"]
    assert any("tensor-parallel-size 2, pipeline-parallel-size 2, expert-parallel-size 2" in n for n in said["notes"])
    assert "made by Slipway" in said["notes"]


def test_any_form_becomes_any_other(split, models, tmp_path):
    run("import", split, tmp_path / "nemo")
    run("verify", tmp_path / "nemo", models("t8"))
    run("import", tmp_path / "nemo", tmp_path / "again", "--format", "classic", "--tensor-parallel-size", 2)
    run("verify", tmp_path / "again", split)
    run("import", tmp_path / "again", tmp_path / "bridge", "--format", "bridge")
    run("verify", tmp_path / "bridge", split)


def test_the_plan_of_the_full_model_is_made_from_headers(tmp_path):
    """671 billion parameters under TP2 PP8 EP32: 512 files, planned without a tensor in memory."""
    config = {**FAMILIES["deepseek_v3"].tiny_config(), "num_hidden_layers": 61, "hidden_size": 7168}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512}
    config |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "intermediate_size": 18432}
    config |= {"moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1, "vocab_size": 129280}
    config |= {"first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "num_experts_per_tok": 8}
    family, known = understood({**config, "num_nextn_predict_layers": 0}, tmp_path / "config.json")
    options = classic.Options(
        tensor_parallel_size=2, pipeline_parallel_size=8, expert_parallel_size=32, num_layers=64,
        noop_layers="47,62,63", num_layers_per_virtual_pipeline_stage=2, moe_grouped_gemm=True,
    )  # fmt: skip
    layout = classic.Layout(known, family.rules(known).megatron, options, True)
    assert len(layout.files) == 512
    first = layout.files[classic.Rank(0, 0, 0)]
    assert first["model1"]["decoder.layers.0.mlp.experts.weight1"].info.shape == (7168, 16384)
    last = layout.files[classic.Rank(0, 7, 0)]
    assert {name.split(".")[2] for name in last["model2"] if name.startswith("decoder.")} == {"0"}
    assert set(last["model3"]) == {"decoder.final_layernorm.weight", "output_layer.weight"}


# ---------------------------------------------------------------------------- NF4

# sha256 of all parts, and of the unpacked tensor, of bitsandbytes 0.50.2 on the CPU (quantize_4bit, dequantize_4bit).
OF_BITSANDBYTES = {
    (64, 64): "b2ea17f7dc70149ac8b4036d89490d6cb08ff7adaec19e86daf72092ca602f06 "
    "95bec45086f79d6c2f4702c3cde58e7b484920da3952a14d4fafd6a76935018d",
    (48, 40): "019fe06c80c1e875ee23e12294e517d314e6d1f0e1e89d86c504d2a0dc129e30 "
    "40e2eb23a83bbcab1a0bcffa3bdd3a818cb4c8eedd937bc7977db016370d708e",
    (130, 33): "5fbdae19b212292a73e87e9adb64c5ad471b4213f9d9e71fe3f14c733553b967 "
    "284e88a16b31ed5bf0997a912c9944feeb308927f22378d642f907f93608ad4f",
    (512, 1024): "bc11ec76b314dd649fad74900f895b497714fffb942fb83ec3741ec4f645ef0f "
    "cfc22e32ee5ec0381e2b17ac86e156782e4bc760ebbdd824e5fb21d90ee0dc66",
    (3, 5): "db81f362512b97f0d34f93bb2c18a76050ab00eb661640d76d6d814e14090253 "
    "5e7772c763b47317c40614cba3b0a44e7ad5f34ad5941d8722e85f87b0b77c97",
}


@pytest.mark.parametrize("shape", OF_BITSANDBYTES)
def test_the_bytes_of_bitsandbytes(shape):
    import hashlib

    text = f"nf4 {shape}".encode()
    bits = np.frombuffer(hashlib.shake_256(text).digest(2 * int(np.prod(shape))), "<u2")
    values = ((bits & 0x8000) | ((0x77 + ((bits >> 7) & 7)) << 7) | (bits & 0x7F)).astype("<u2").reshape(shape)
    packed = nf4.pack(values, "bitsandbytes")
    found = hashlib.sha256()
    for suffix in sorted(packed):
        elements = np.ascontiguousarray(packed[suffix][0])
        found.update(suffix.encode() + str(list(elements.shape)).encode() + elements.tobytes())
    tensors = {f"w{suffix}": as_torch(*part) for suffix, part in packed.items()}
    meant = unpacked(tensors, "w").contiguous().view(torch.uint8).numpy().tobytes()
    assert f"{found.hexdigest()} {hashlib.sha256(meant).hexdigest()}" == OF_BITSANDBYTES[shape]


def as_torch(elements: np.ndarray, dtype: str) -> torch.Tensor:
    kinds = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}
    return torch.from_numpy(np.ascontiguousarray(elements).copy()).view(kinds[dtype])


@pytest.mark.parametrize("suffix", ["", *nf4.PARTS])
@pytest.mark.parametrize("how", ["missing", "shorter", "of another dtype"])
def test_parts_of_nf4_that_do_not_belong_together(suffix, how):
    if (suffix, how) == (nf4.STATE, "of another dtype"):
        return  # it is a text, whatever its bytes are called
    packed = nf4.pack(np.zeros((64, 300), np.uint16), "bitsandbytes")
    infos = {name: TensorInfo(elements.shape, dtype) for name, (elements, dtype) in packed.items()}
    known = nf4.source_of(infos, lambda name, first, end: packed[name][0].reshape(-1)[first:end], "W", (64, 300))
    assert known.form == "bitsandbytes"
    spoiled = {"shorter": TensorInfo((1,), packed[suffix][1]), "of another dtype": replace(infos[suffix], dtype="F16")}
    infos[suffix] = spoiled.get(how, infos[suffix])
    if how == "missing":
        del infos[suffix]
    with pytest.raises(DataError, match=r"W.*(missing|lacks its .*|belong together|damaged); copy the"):
        nf4.source_of(infos, lambda name, first, end: packed[name][0].reshape(-1)[first:end], "W", (64, 300))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
def test_a_model_of_hugging_face_in_nf4(tmp_path, capsys, storage):
    """As transformers saves it with bitsandbytes: packed linear layers, and the rest in BF16. For FSDP the packed bytes
    are kept as elements of another dtype (bnb_4bit_quant_storage)."""
    from safetensors.torch import save_file

    source = make_model(tmp_path / "hf", "llama31", quantized=False)
    tensors, wanted = {}, {}
    for name, tensor in load_all(source).items():
        wanted[name] = tensor
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            packed = nf4.pack(tensor.view(torch.uint16).numpy(), "bitsandbytes")
            del tensors[name]
            tensors |= {f"{name}{suffix}": as_torch(*part) for suffix, part in packed.items()}
            wanted[name] = unpacked(tensors, name)
            tensors[name] = tensors[name].reshape(-1).view(getattr(torch, storage))[:, None]
    folder = tmp_path / "nf4"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    about["bnb_4bit_quant_storage"] = storage
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    run("dequant", folder, tmp_path / "bf16")
    assert classic_models.digest(load_all(tmp_path / "bf16")) == classic_models.digest(wanted)
    run("inspect", folder)
    assert "nf4" in capsys.readouterr().out
    run("import", folder, tmp_path / "nemo")
    run("verify", tmp_path / "nemo", tmp_path / "bf16")


def test_the_two_forms_are_told_apart(models, tmp_path):
    """Each is read as what it is, whatever the flags would say. The flag alone is bitsandbytes, as in MindSpeed."""
    for form, words in (("bitsandbytes", []), ("npu", ["npu"])):
        out = tmp_path / form
        run("import", models("t8"), out, "--qlora-nf4", *words, "--format", "classic")
        assert json.loads((out / classic_files.NOTE / "layout.json").read_text())["qlora_nf4"] == form
        theirs = classic_models.as_mindspeed(out, tmp_path / f"{form}-theirs")
        run("export", theirs, tmp_path / f"{form}-hf", "--config", models("t8"))
        before, after = load_all(models("t8")), load_all(tmp_path / f"{form}-hf")
        worst = max((after[name].float() - before[name].float()).abs().max().item() for name in after)
        assert worst < 0.25  # NF4's largest step, of values up to 1


def test_options_are_what_mindspeed_calls_them():
    assert set(vars(classic.Options())) >= {
        name.replace("-", "_") for case in GOLDEN.values() for name in case["options"] if "lora" not in name
    }
    assert replace(classic.Options(), mtp_num_layers=1).described() == {"mtp_num_layers": 1}


# ---------------------------------------------------------------------------- damage


@pytest.mark.parametrize("seed", range(40))
def test_damaged_files_are_one_line(seed, split, models, tmp_path, capsys):
    """Bytes of a rank's file are changed, mostly of its pickle and directory: it is read, or refused in one line."""
    rng = random.Random(seed)
    damaged = tmp_path / "damaged"
    shutil.copytree(split, damaged)
    file = damaged / "iter_0000001" / "mp_rank_00_000_000" / classic.FILE
    content = bytearray(file.read_bytes())
    places = {0: range(64, 3000), 1: range(len(content) - 4000, len(content)), 2: range(len(content))}[seed % 3]
    for _ in range(rng.choice([1, 4, 60])):
        content[rng.choice(places)] = rng.randrange(256)
    file.write_bytes(content if rng.random() < 0.8 else content[: rng.randrange(len(content))])
    capsys.readouterr()
    code = cli.main(["export", str(damaged), str(tmp_path / "out"), "--config", str(models("t8"))])
    said = capsys.readouterr().err
    assert code in (0, 2, 65), said
    assert code == 0 or len(said.strip().splitlines()) == 1, said
    assert "Traceback" not in said and "does not know" not in said


def test_a_file_that_would_run_code_is_only_read(split, models, tmp_path, capsys):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'harm'}",)

    damaged = tmp_path / "damaged"
    shutil.copytree(split, damaged)
    file = damaged / "iter_0000001" / "mp_rank_00_000_000" / classic.FILE
    saved = classic_models.load(file)
    torch.save({**saved, "rng_state": Harm()}, file)
    run("export", damaged, tmp_path / "out")
    run("verify", models("t8"), tmp_path / "out")
    assert not (tmp_path / "harm").exists()


# ---------------------------------------------------------------------------- torch_dist by ranges


def test_one_chunk_is_read_by_ranges(tmp_path, monkeypatch):
    """A tensor that one rank has saved is one chunk: only the rows that a piece needs are read of it."""
    from slipway.checkpoint import torch_dist
    from slipway.tensors.refs import Ref
    from torch.distributed.checkpoint import FileSystemWriter, save

    tensor = torch.arange(1 << 20, dtype=torch.float32).reshape(1024, 1024).bfloat16()
    save({"module.a": tensor, "module.b": tensor.T.contiguous()}, storage_writer=FileSystemWriter(tmp_path))
    reader = torch_dist.Reader(tmp_path)
    read, real = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read.append(n := real(fd, buffers, at)) or n)
    for start in range(0, 1024, 64):
        part = reader.read(Ref("a", (), (start, start + 64)))
        assert np.array_equal(part, tensor[start : start + 64].view(torch.uint16).numpy())
    assert sum(read) <= 1.1 * tensor.nbytes


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_layers", 10**12),
        ("num_layers", "many"),
        ("tensor_model_parallel_size", 1000),
        ("pipeline_model_parallel_size", 10**9),
        ("expert_model_parallel_size", 1024),
        ("num_experts", 10**9),
        ("hidden_size", 1 << 40),
        ("num_layers_per_virtual_pipeline_stage", 0),
    ],
)
def test_sizes_that_the_files_do_not_explain(field, value, models, tmp_path, capsys):
    """Megatron-LM's arguments come from a stranger: nothing is built from them before they are bounded."""
    from argparse import Namespace

    run("import", models("t8"), tmp_path / "out", "--format", "classic")
    shutil.rmtree(tmp_path / "out" / classic_files.NOTE)
    file = tmp_path / "out" / "iter_0000001" / "mp_rank_00" / classic.FILE
    saved = classic_models.load(file)
    changed = {field: value} | ({"num_moe_experts": value} if field == "num_experts" else {})
    torch.save({**saved, "args": Namespace(**{**vars(saved["args"]), **changed})}, file)
    for words in (["export", tmp_path / "out", tmp_path / "hf"], ["inspect", tmp_path / "out"]):
        capsys.readouterr()
        assert cli.main([*map(str, words)]) in (2, 65)
        assert "Traceback" not in capsys.readouterr().err


def test_numbers_of_run_config_are_numbers_in_yaml(tmp_path):
    """YAML 1.1, which Megatron-Bridge reads, takes 1e-05 for a text; its model would end with an error."""
    source = make_model(tmp_path / "hf", "llama31", {"rms_norm_eps": 1e-5, "rope_theta": 1e16}, quantized=False)
    run("import", source, tmp_path / "bridge", "--format", "bridge")
    found = yaml.safe_load((tmp_path / "bridge" / "iter_0000000" / "run_config.yaml").read_text())["model"]
    assert found["layernorm_epsilon"] == 1e-5 and found["rotary_base"] == 1e16
    assert not [value for value in found.values() if isinstance(value, str) and value[:1].isdecimal()]


def test_a_note_whose_options_are_null(split, models, tmp_path):
    """The fuzzer found it: what is null is not said."""
    noted = Path(shutil.copytree(split, tmp_path / "noted"))
    (noted / "slipway" / "layout.json").write_text('{"tensor_parallel_size": null, "noop_layers": null}')
    run("verify", noted, models("t8"))


def test_merge_keys_of_yaml_are_refused(tmp_path):
    """Ten levels of ten merges are ten thousand million fields."""
    from slipway.checkpoint import described
    from slipway.errors import DataError

    lines = ["a0: &a0 {k0: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 11)]
    (tmp_path / "run_config.yaml").write_text("\n".join([*lines, "model: *a10"]))
    with pytest.raises(DataError, match="is damaged"):
        described._yaml(tmp_path / "run_config.yaml", "model")
