"""Damaged input: one line that names what is wrong and what to do, never a traceback, never a large allocation."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slipway.commands.dequant import dequant
from slipway.commands.export import export
from slipway.commands.import_checkpoint import import_checkpoint
from slipway.errors import DataError, SlipwayError, UsageError

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def model(mxfp4_model, tmp_path) -> Path:
    return Path(shutil.copytree(mxfp4_model, tmp_path / "model"))


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_tensor(header: dict) -> dict:
    return header[next(name for name in header if name != "__metadata__")]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
CASES = {
    "weights of Git LFS": (lambda m: (m / SHARD).write_text(POINTER), f"{SHARD} is not the file itself but Git LFS's"),
    "config of Git LFS": (lambda m: (m / "config.json").write_text(POINTER), "get the file with `git lfs pull`"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json is missing"),
    "config no JSON": (lambda m: (m / "config.json").write_text("{"), "cannot be read as JSON"),
    "config a list": (lambda m: (m / "config.json").write_text("[]"), "is not a JSON object"),
    "unknown architecture": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(model_type="gpt_os")),
        "unknown model_type 'gpt_os', did you mean gpt_oss?",
    ),
    "field missing": (
        lambda m: edit_json(m / "config.json", lambda c: c.pop("num_local_experts")),
        "field num_local_experts is missing",
    ),
    "field a word": (lambda m: edit_json(m / "config.json", lambda c: c.update(head_dim="x")), "field head_dim is 'x'"),
    "field negative": (lambda m: edit_json(m / "config.json", lambda c: c.update(hidden_size=-1)), "more than 0"),
    "another size": (lambda m: edit_json(m / "config.json", lambda c: c.update(vocab_size=513)), "has shape"),
    "one layer more": (
        lambda m: edit_json(
            m / "config.json", lambda c: c.update(num_hidden_layers=3, layer_types=["full_attention"] * 3)
        ),
        "is missing",
    ),
    "one layer fewer": (
        lambda m: edit_json(m / "config.json", lambda c: c.update(num_hidden_layers=1, layer_types=["full_attention"])),
        "unexpected tensor model.layers.1.",
    ),
    "yarn without factor": (
        lambda m: edit_json(m / "config.json", lambda c: c["rope_scaling"].pop("factor")),
        "rope_scaling.factor",
    ),
    "no weights": (lambda m: [f.unlink() for f in m.glob("model*")], "has neither"),
    "index no JSON": (lambda m: (m / INDEX).write_text("nope"), "cannot be read as JSON"),
    "index without map": (lambda m: (m / INDEX).write_text("{}"), "is damaged"),
    "index leads elsewhere": (
        lambda m: edit_json(m / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../../x.safetensors"})),
        "is damaged",
    ),
    "file of the index missing": (lambda m: (m / SHARD).unlink(), f"names {SHARD}, which is missing"),
    "index names a tensor too many": (
        lambda m: edit_json(m / INDEX, lambda i: i["weight_map"].update({"x": SHARD})),
        "tensor x is not in",
    ),
    "empty file": (lambda m: (m / SHARD).write_bytes(b""), "not a safetensors file"),
    "cut off": (lambda m: (m / SHARD).write_bytes((m / SHARD).read_bytes()[:-100]), "the file ends inside tensor"),
    "header of 2^60 bytes": (
        lambda m: (m / SHARD).write_bytes(struct.pack("<Q", 1 << 60) + (m / SHARD).read_bytes()[8:]),
        "not a safetensors file, or incomplete",
    ),
    "tensor of 2^59 elements": (
        lambda m: rewrite_header(m / SHARD, lambda h: first_tensor(h).update(shape=[1 << 59])),
        "its shape needs",
    ),
    "unknown dtype": (
        lambda m: rewrite_header(m / SHARD, lambda h: first_tensor(h).update(dtype="F3")),
        "unknown dtype",
    ),
    "offsets overlap": (
        lambda m: rewrite_header(m / SHARD, overlap),
        "overlap",
    ),
    "scales missing": (lambda m: rename_scales(m), "has no scales"),
    "FP8 vector": (lambda m: as_fp8(m, "model.norm.weight"), "supported only for matrices"),
    "FP8 stack": (lambda m: as_fp8(m, f"{EXPERTS}.gate_up_proj", (4, 64, 128)), "supported only for matrices"),
    "FP8 biases of experts": (
        lambda m: as_fp8(m, f"{EXPERTS}.down_proj_bias"),
        f"FP8 tensor {EXPERTS}.down_proj_bias has shape [4, 64]; FP8 is supported only for matrices of weights",
    ),
}


def overlap(header: dict) -> None:
    names = [name for name in header if name != "__metadata__"]
    header[names[1]] = dict(header[names[0]])


def rename_scales(model: Path) -> None:
    name = next(n for n in json.loads((model / INDEX).read_text())["weight_map"] if n.endswith("_scales"))
    file = json.loads((model / INDEX).read_text())["weight_map"][name]
    edit_json(model / INDEX, lambda i: i["weight_map"].update({"odd": i["weight_map"].pop(name)}))
    rewrite_header(model / file, lambda h: h.update({"odd": h.pop(name)}))


def as_fp8(model: Path, name: str, shape: tuple[int, ...] = ()) -> None:
    """Store one tensor (and nothing quantised of that name) as FP8 with a scale for all of it."""
    stored = {n: t for file in model.glob("*.safetensors") for n, t in load_file(file).items()}
    shape = shape or tuple(stored[name].shape)
    stored = {n: t for n, t in stored.items() if n not in (name, f"{name}_blocks", f"{name}_scales")}
    stored |= {name: torch.zeros(shape).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    for file in [*model.glob("*.safetensors"), model / INDEX]:
        file.unlink()
    save_file(stored, model / "model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_each_defect_is_named(case, model, tmp_path):
    change, message = CASES[case]
    change(model)
    for command in (dequant, import_checkpoint):
        with pytest.raises(DataError) as error:
            command(str(model), str(tmp_path / "out"))
        assert message in str(error.value) and "\n" not in str(error.value)
        assert error.value.exit_code == 65
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


RANK = "iter_0000001/mp_rank_01_001/model_optim_rng.pt"
BRIDGE = "iter_0000000"


@pytest.fixture(scope="module")
def megatron(mxfp4_model, tmp_path_factory) -> Path:
    """The model in Megatron's forms: classic, bridge, and made, which is NeMo's without our config.json."""
    root = tmp_path_factory.mktemp("megatron")
    layout = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    import_checkpoint(str(mxfp4_model), str(root / "classic"), format="classic", **layout)
    import_checkpoint(str(mxfp4_model), str(root / "bridge"), format="bridge")
    import_checkpoint(str(mxfp4_model), str(root / "made"))
    (root / "made" / "context" / "hf_config.json").unlink()
    return root


def edit_rank(file: Path, change) -> None:
    """Change what a rank has saved, and save it again as Megatron does."""
    saved = torch.load(file, weights_only=False)
    saved = change(saved) or saved
    torch.save(saved, file)


def without(name: str):
    return lambda saved: [saved["model"].pop(name)][:0]


def halved(name: str):
    return lambda saved: saved["model"].update({name: saved["model"][name][::2].clone()})


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


PROJECTION = "decoder.layers.0.self_attention.linear_proj.weight"
# Form, change, what is said.
MEGATRON = {
    "a rank is missing": ("classic", lambda m: shutil.rmtree((m / RANK).parent), "mp_rank_01_001 is missing"),
    "a rank's file is empty": ("classic", lambda m: (m / RANK).write_bytes(b""), "is damaged"),
    "a rank's file is cut": ("classic", lambda m: (m / RANK).write_bytes((m / RANK).read_bytes()[:-99]), "is damaged"),
    "a rank's file is no checkpoint": ("classic", lambda m: torch.save([1], m / RANK), "is damaged"),
    "a rank's file is old": (
        "classic",
        lambda m: torch.save({"model": {}}, m / RANK, _use_new_zipfile_serialization=False),
        "torch before 1.6",
    ),
    "a rank has no model": ("classic", lambda m: torch.save({"iteration": 1}, m / RANK), "is missing"),
    "a rank lacks a tensor": ("classic", lambda m: edit_rank(m / RANK, without(PROJECTION)), "linear_proj.weight is"),
    "a rank has another shape": ("classic", lambda m: edit_rank(m / RANK, halved(PROJECTION)), "but the layout needs"),
    "a rank has a tensor more": (
        "classic",
        lambda m: edit_rank(m / RANK, lambda saved: saved["model"].update(x=torch.ones(2))),
        "unexpected tensor x",
    ),
    "a rank too many": (
        "classic",
        lambda m: shutil.copytree((m / RANK).parent, m / "iter_0000001" / "mp_rank_02_001"),
        "mp_rank_02_001 is not of this layout",
    ),
    "a note of another layout": (
        "classic",
        lambda m: edit_json(m / "slipway" / "layout.json", lambda note: note.update(noop_layers="0")),
        "no-op",
    ),
    "a note with an unknown option": (
        "classic",
        lambda m: edit_json(m / "slipway" / "layout.json", lambda note: note.update(x=1)),
        "unknown option x",
    ),
    "a note that is no JSON": (
        "classic", lambda m: (m / "slipway" / "layout.json").write_text("{"), "cannot be read as JSON"
    ),
    "run_config.yaml is gone": ("bridge", lambda m: (m / BRIDGE / "run_config.yaml").unlink(), "with --config"),
    "run_config.yaml is no YAML": ("bridge", lambda m: (m / BRIDGE / "run_config.yaml").write_text("{"), "is damaged"),
    "run_config.yaml has no model": (
        "bridge", lambda m: (m / BRIDGE / "run_config.yaml").write_text("x: 1"), "has no table model"
    ),
    "run_config.yaml says another model": (
        "bridge",
        lambda m: edit_text(m / BRIDGE / "run_config.yaml", '"num_layers": 2', '"num_layers": 3'),
        "for 3 layers",
    ),
    ".metadata is cut": (
        "bridge",
        lambda m: (m / BRIDGE / ".metadata").write_bytes((m / BRIDGE / ".metadata").read_bytes()[:-99]),
        "is damaged",
    ),
    "the weights are cut": (
        "bridge",
        lambda m: (m / BRIDGE / "__0_0.distcp").write_bytes((m / BRIDGE / "__0_0.distcp").read_bytes()[:99_999]),
        "copy",
    ),
    "the weights are a pointer of Git LFS": (
        "bridge", lambda m: (m / BRIDGE / "__0_0.distcp").write_text(POINTER), "but Git LFS's pointer to it"
    ),
    "a rank is a pointer of Git LFS": (
        "classic", lambda m: (m / RANK).write_text(POINTER), "but Git LFS's pointer to it"
    ),
    "the weights are gone": ("bridge", lambda m: (m / BRIDGE / "__0_0.distcp").unlink(), "is missing"),
    "io.json is no JSON": ("made", lambda m: (m / "context" / "io.json").write_text("{"), "cannot be read as JSON"),
    "io.json is no context": ("made", lambda m: (m / "context" / "io.json").write_text("{}"), "not a context of NeMo"),
    "no context": ("made", lambda m: shutil.rmtree(m / "context"), "give the model's config.json with --config"),
    "model.yaml is no YAML": ("made", lambda m: (m / "context" / "model.yaml").write_text("a: [b"), "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", MEGATRON)
def test_each_defect_of_megatrons_forms_is_named(case, megatron, tmp_path):
    form, change, message = MEGATRON[case]
    checkpoint = Path(shutil.copytree(megatron / form, tmp_path / form))
    change(checkpoint)
    for command in (export, import_checkpoint):
        with pytest.raises(SlipwayError) as error:
            command(str(checkpoint), str(tmp_path / "out"))
        assert message in str(error.value) and "\n" not in str(error.value)
        assert error.value.exit_code in (2, 65)
    assert not (tmp_path / "out").exists()


def test_a_person_sees_one_line_and_the_exit_code(model, tmp_path, slipway):
    (model / SHARD).write_bytes(b"garbage" * 100)
    done = slipway("import", model, tmp_path / "out")
    assert done.returncode == 65 and done.stdout == ""
    assert done.stderr.startswith("slipway: ") and done.stderr.count("\n") == 1 and SHARD in done.stderr


def test_a_path_that_is_not_there(model, tmp_path, slipway):
    done = slipway("import", tmp_path / "modle", tmp_path / "out")
    assert done.returncode == 2 and "did you mean" in done.stderr and "model?" in done.stderr


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "1e30GB", "GB"])
def test_sizes_that_are_none(text, model, tmp_path):
    with pytest.raises(UsageError, match="--memory"):
        import_checkpoint(str(model), str(tmp_path / "out"), memory=text)


def test_six_hundred_mutations(model, nemo_model, megatron, tmp_path):
    """Random bytes changed, cut or inserted in headers, index, config and metadata: an answer or one clear line."""
    rng = random.Random(0)
    nemo = Path(shutil.copytree(nemo_model, tmp_path / "nemo"))
    targets = [(model, name) for name in ("config.json", INDEX, SHARD)]
    targets += [(nemo, f"weights/{name}") for name in (".metadata", "__0_0.distcp")]
    targets += [(nemo, "context/hf_config.json")]
    forms = {form: Path(shutil.copytree(megatron / form, tmp_path / form)) for form in ("classic", "bridge", "made")}
    targets += [(forms["classic"], name) for name in (RANK, "slipway/layout.json")]
    targets += [(forms["bridge"], f"{BRIDGE}/{name}") for name in ("run_config.yaml", ".metadata")]
    targets += [(forms["made"], f"context/{name}") for name in ("io.json", "model.yaml")]
    refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for round_ in range(600):
        checkpoint, name = targets[round_ % len(targets)]
        target = checkpoint / name
        original = target.read_bytes()
        target.write_bytes(mutate(original, rng))
        out = tmp_path / f"out{round_}"
        try:
            (import_checkpoint if checkpoint == model else export)(str(checkpoint), str(out))
        except SlipwayError as error:
            refused += 1
            assert "\n" not in str(error) and error.exit_code in (2, 65), error
            assert not out.exists()
        target.write_bytes(original)
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / f".out{round_}.partial", ignore_errors=True)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert refused > 200 and grown < 500_000_000


def mutate(content: bytes, rng: random.Random) -> bytes:
    reach = min(len(content), 4000)  # where headers are
    at, kind = rng.randrange(reach), rng.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.randbytes(rng.randint(1, 8)) + content[at:]
    if kind == 2:
        return content[:at] + content[at + rng.randint(1, 50) :]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        changed[rng.randrange(reach)] = rng.randrange(256)
    return bytes(changed)
