"""What a checkpoint of any known format contains, and what is missing, from headers and metadata alone.

Something that is missing does not stop the inspection: it is noted, and the rest is read. Only a file that cannot be
read is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint import (
    classic,
    classic_files,
    classic_reader,
    codecs,
    described,
    huggingface,
    lora,
    nemo_context,
    peft,
    surplus,
    torch_dist,
)
from slipway.checkpoint.contents import Contents
from slipway.checkpoint.heads import ADAPTER
from slipway.checkpoint.heads import FILE as HEADS_FILE
from slipway.checkpoint.heads import NAMES as HEADS
from slipway.checkpoint.opened import (
    EMBEDDING,
    HEAD,
    NOTHING,
    VOCABULARY,
    Given,
    context_folder,
    of_fsdp,
    same_values,
    weights_of,
)
from slipway.errors import DataError, UsageError
from slipway.families import by_model_type, read_config, rules, understood
from slipway.families.checks import check_stored
from slipway.families.decoder import is_tied
from slipway.families.mtp import has_mtp, without_mtp
from slipway.tensors.refs import TensorInfo, stored_bytes
from slipway.untrusted import harmless, read_object

BASE = "llm."  # before the names of the base model in a model merged with heads
MERGED_TYPE = "autodeco"
# The fields of a merged model's config.json that its base does not have.
OF_MERGED = {
    "base_model_type",
    "base_model_name_or_path",
    "enable_temperature_head",
    "enable_top_p_head",
    "use_enhanced_features",
    "temperature_hidden_size",
    "top_p_hidden_size",
}
SAMPLE_ROWS = 64
# What says which model it is → what made the checkpoint.
MADE_BY = {
    "io.json": "NeMo 2",
    "model.yaml": "NeMo 2",
    described.BRIDGE: "Megatron-Bridge",
    described.COMMON: "Megatron-LM",
}
# Elements with a scale, where config.json need not say it.
GROUPS = {"mxfp4": [codecs.MX_GROUP], "mxfp8": [codecs.MX_GROUP], "nvfp4": [codecs.NV_GROUP]}


def contents_of(path: Path, given: Given = NOTHING) -> Contents:
    """What is at `path`; UsageError if there is nothing, DataError if it cannot be read or is of an unknown kind.

    Args:
        given: what the user says of a Megatron checkpoint that does not say it itself.
    """
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        raise UsageError(f"{path} does not exist; give a checkpoint: a file or a folder")
    if classic_files.is_classic(path):
        return _of_classic(path, given)
    path = torch_dist.newest(path)
    if any((folder / ".metadata").is_file() for folder in (path / "weights", path)):
        return _of_torch_dist(path, given)
    if (path / HEADS_FILE).is_file():
        return _of_heads(path)
    if (path / peft.CONFIG).is_file() and not (path / "config.json").is_file():
        return _of_adapter(path)
    if huggingface.weight_files(path) or any(path.glob("*.safetensors")):
        return _of_huggingface(path)
    if (path / "config.json").is_file():
        huggingface.read_folder(path)  # it says in which form the weights are
    raise DataError(
        f"{path} is not a checkpoint of a known kind: it has no *.safetensors and no weights/.metadata; "
        "check the path, or copy the checkpoint again"
    )


# ---------------------------------------------------------------------------- safetensors


def _of_file(file: Path) -> Contents:
    """One file; the scales or blocks of its tensors may be in another file."""
    try:
        stored = huggingface.read_file(file)
    except DataError:
        if file.suffix in ("", ".safetensors", ".bin"):  # the hub's cache has files without
            raise
        form = huggingface.OTHERS.get(file.suffix)
        what = f"weights in {form}, which is not supported" if form else "no weights of a known kind"
        raise DataError(f"{file} has {what}; give a *.safetensors, a *.bin or the folder of a checkpoint") from None
    tensors = {name: place.info for name, place in stored.items() if not codecs.is_scale(name)}
    packed = [name for name, info in tensors.items() if info.dtype == "U8"]
    quantized = packed or [name for name, info in tensors.items() if info.dtype in codecs.FP8]
    method = ("mxfp4" if packed[0].endswith("_blocks") else "fp4") if packed else "fp8"
    return Contents(
        path=str(file),
        format="one file of torch" if file.suffix == ".bin" else "one safetensors file",
        model="",
        # Two elements in each byte: once more than there are bytes.
        parameters=_parameters(tensors.values()) + _parameters(tensors[name] for name in packed),
        dtypes=_dtypes(place.info for place in stored.values()),
        files={file.name: file.stat().st_size},
        quantization={"method": method, "block": GROUPS.get(method, []), "tensors": len(quantized)}
        if quantized
        else None,
    )


def _of_heads(folder: Path) -> Contents:
    file = folder / HEADS_FILE
    found = {name: place.info for name, place in huggingface.read_header(file).items()}
    problems = {} if (folder / "config.json").is_file() else {"missing files": ["config.json"]}
    return Contents(
        path=str(folder),
        format="extracted heads",
        model="temperature and top-p heads",
        parameters=_parameters(found.values()),
        dtypes=_dtypes(found.values()),
        files={HEADS_FILE: file.stat().st_size},
        checked="the heads' names",
        problems=problems | _compare(found.keys(), HEADS),
    )


def _of_adapter(folder: Path) -> Contents:
    """An adapter of `peft`: two matrices for each module; which ones the base needs it does not say."""
    about = read_object(folder / peft.CONFIG)
    stored, problems = _stored_in(folder, [])
    found = {name: place.info for name, place in stored.items()}
    halves = {name: name.replace("lora_A", "lora_B") for name in found if "lora_A" in name}
    lonely = [other for other in halves.values() if other not in found]
    return Contents(
        path=str(folder),
        format=f"adapter of peft ({about.get('peft_type') or 'of an unknown kind'})",
        model=harmless(str(about.get("base_model_name_or_path") or ""), 200),
        parameters=_parameters(found.values()),
        dtypes=_dtypes(found.values()),
        files={file.name: file.stat().st_size for file in sorted({place.file for place in stored.values()})},
        checked="its own pairs of matrices",
        problems=problems | ({"missing tensors": lonely} if lonely else {}),
    )


def _of_huggingface(folder: Path) -> Contents:
    notes: list[str] = []
    stored, problems = _stored_in(folder, notes)
    if huggingface.weight_files(folder) is None:
        names = ", ".join(sorted({place.file.name for place in stored.values()}))
        problems["names of files"] = [f"{names}, where other commands look for {huggingface.SINGLE} or its shards"]
    config: dict[str, Any] = {}
    if (folder / "config.json").is_file():
        config = read_config(folder / "config.json")
    else:
        problems["missing files"] = [*problems.get("missing files", []), "config.json"]
    reader, unscaled = _reader(folder, stored, config)
    problems |= unscaled
    wanted, checked = _wanted_of(config, folder / "config.json", reader, notes)
    if checked:
        problems = _compare_infos(reader.tensors, wanted) | problems
    if (differs := _untied(config, reader)) and not problems:
        problems = {"config.json contradicted": [differs]}
    merged = config.get("model_type") == MERGED_TYPE
    base = sum(name.startswith(BASE) for name in reader.tensors)
    return Contents(
        path=str(folder),
        format="Hugging Face, base merged with heads" if merged else "Hugging Face",
        model=_model_name(config),
        parameters=_parameters(reader.tensors.values()),
        dtypes=_dtypes(place.info for place in stored.values()),
        files={file.name: file.stat().st_size for file in sorted({place.file for place in stored.values()})},
        parts={"base": base, "heads": len(reader.tensors) - base} if merged else {},
        quantization=_quantization(reader, config),
        checked=checked or ("the index" if (folder / huggingface.INDEX).is_file() else ""),
        problems=problems,
        notes=notes,
    )


def _untied(config: Mapping[str, Any], reader: huggingface.Reader) -> str:
    """What is wrong where config.json ties the output layer to the embedding and the file has another one.

    A few rows of both are compared: reading all of them would take as long as the file is large.
    """
    if not is_tied(config) or not {HEAD, EMBEDDING} <= reader.tensors.keys():
        return ""
    rows = reader.tensors[HEAD].shape[0]
    step = max(1, rows // SAMPLE_ROWS)
    for row in range(0, rows, step):
        if not same_values(reader, HEAD, EMBEDDING, (row, row + 1)):
            return f"tie_word_embeddings is true, but {HEAD} is not the embedding; `import` keeps it, untied"
    return ""


def _stored_in(folder: Path, notes: list[str]) -> tuple[dict[str, huggingface.Stored], dict[str, list[str]]]:
    """(name → place of all tensors in the files, problems where files and index disagree)."""
    files = huggingface.weight_files(folder)
    if files is None:
        files = huggingface.Files(tuple(sorted(file.name for file in folder.glob("*.safetensors"))))
    stored, found = huggingface.places_in(folder, files)
    notes += found
    problems = {"missing files": list(files.missing)}
    if files.where is not None:
        promised = (name for name in files.where if name != HEAD)  # a tied model's index may list it
        problems["not in the files"] = [name for name in promised if name not in stored]
        problems["not in the index"] = sorted(name for name in stored if name not in files.where)
    return stored, _only_filled(problems)


def _reader(
    folder: Path, stored: Mapping[str, huggingface.Stored], config: Mapping[str, Any]
) -> tuple[huggingface.Reader, dict[str, list[str]]]:
    """(reader of all tensors that can be decoded, problems with the scales of the others)."""
    infos = {name: place.info for name, place in stored.items()}
    missing = {name: scale for name in infos if (scale := codecs.missing_scale(name, infos))}
    bases = [name.removesuffix("_packed").removesuffix("_blocks") for name in missing]
    without = {*missing, *(f"{base}{scale}" for base in bases for scale in codecs.SCALES)}
    reader = huggingface.Reader(folder, {n: place for n, place in stored.items() if n not in without}, config)
    return reader, _only_filled({"missing scales": sorted(missing.values())})


def _quantization(reader: huggingface.Reader, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Method, block size and number of tensors, from config.json and the tensors; None if nothing is quantised."""
    about = config.get("quantization_config")
    about = about if isinstance(about, dict) else {}
    names = reader.quantized
    if not names and not about:
        return None
    # What is stored tells more than config.json: a file of NVFP4 may still have the fp8 of its source.
    told = [form for form in reader.forms if form in GROUPS]
    if told:
        return {"method": " and ".join(reader.forms), "block": GROUPS[told[0]], "tensors": len(names)}
    method = reader.declared.method or "fp8"
    return {"method": method, "block": about.get("weight_block_size") or [], "tensors": len(names)}


def _model_name(config: Mapping[str, Any]) -> str:
    kind = config.get("base_model_type" if config.get("model_type") == MERGED_TYPE else "model_type")
    return str(kind) if kind else ""


def base_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the base inside a merged model; of any other model, its own."""
    if config.get("model_type") != MERGED_TYPE:
        return dict(config)
    base = {name: value for name, value in config.items() if name not in OF_MERGED}
    return {**base, "model_type": config.get("base_model_type")}


def _wanted_of(
    config: Mapping[str, Any], where: Path, reader: huggingface.Reader, notes: list[str]
) -> tuple[dict[str, TensorInfo | None], str]:
    """(name → what a config.json asks for, None = any shape; what says so). Both empty for an unknown model_type.

    What import leaves out is taken away from the reader's tensors, and noted.
    """
    base = base_config(config)
    if not _known(base):
        notes += reader.notes
        return {}, ""
    family, base = understood(base, where)
    prefix = BASE if config.get("model_type") == MERGED_TYPE else ""
    notes += surplus.settle(reader, base)
    names = [name.removeprefix(prefix) for name in reader.tensors]
    wanted = family.rules(base if has_mtp(base, names) else without_mtp(base)).hf
    surplus.unstack(reader, wanted)
    if is_tied(base) and "lm_head.weight" in names:  # some checkpoints store the embedding twice
        wanted = {**wanted, "lm_head.weight": wanted["model.embed_tokens.weight"]}
    return {prefix + name: info for name, info in wanted.items()} | dict.fromkeys(
        HEADS if prefix else ()
    ), "config.json"


# ---------------------------------------------------------------------------- torch_dist


def _of_classic(path: Path, given: Given) -> Contents:
    """Megatron's classic layout. Where nothing says which model it is, only what is there is told."""
    folder = classic_files.iteration_of(path)
    assert folder is not None
    ranks = classic_files.Ranks(folder)
    stored = [place.info for saved in ranks.saved.values() for held in saved.chunks.values() for place in held.values()]
    adapters = [p.info for chunks in ranks.adapters.values() for held in chunks.values() for p in held.values()]
    made_by = "Megatron-LM" if ranks.args else "MindSpeed-LLM, or another that saves no args"
    if (folder.parent / classic_files.NOTE).is_dir():
        made_by = "Slipway"
    notes = [f"made by {made_by}"]
    problems: dict[str, list[str]] = {}
    checked = model = ""
    parameters = 0
    try:
        found = classic_files.find(path, given.layout, given.config)
        notes.append(f"layout: {_layout_words(found.layout.options)}")
        model = str(found.said.config.get("model_type", ""))
        parameters = _parameters(found.rules.megatron.values()) if not ranks.only_adapters else 0
        if not ranks.only_adapters:
            classic_reader.Reader(found.ranks, found.layout)
            checked = found.said.where.name
        notes += found.notes
    except (DataError, UsageError) as error:
        if given == NOTHING and not ranks.args and made_by != "Slipway":
            notes.append(str(error))
        else:
            problems = {"layout": [str(error)]}
    what = " of low-rank adapters" if ranks.only_adapters else " with low-rank adapters" if adapters else ""
    return Contents(
        path=str(path),
        format=f"Megatron's classic layout{what}",
        model=model,
        parameters=parameters,
        dtypes=_dtypes([*stored, *adapters]),
        files={f"{name}/{classic.FILE}": (folder / name / classic.FILE).stat().st_size for name in ranks.saved},
        parts={"model": len(stored), "adapters": len(adapters)} if adapters else {},
        checked=checked,
        problems=problems,
        notes=notes,
    )


def _layout_words(options: classic.Options) -> str:
    """The options that are not the default."""
    said = [f"{name.replace('_', '-')} {value}" for name, value in options.described().items()]
    return ", ".join(said) or "one rank"


def _of_torch_dist(path: Path, given: Given) -> Contents:
    reader = torch_dist.Reader(path, whole=False)
    problems = _files_problems(reader.folder, reader.extents)
    context = context_folder(reader.folder)
    told, notes = _told(reader, given)
    parts = _parts(reader.tensors)
    wanted, checked, model = _wanted_by_nemo(context, parts, told)
    if parts["model"]:  # as `export` takes them: under one key for all layers, or one for each
        reader.adopt({key: info for key, info in wanted.items() if info})
        parts = _parts(reader.tensors)
    if checked and parts["adapters"]:
        problems = _misfit(reader, wanted, context) | problems
    elif checked:
        problems = _compare_infos(parts["model"] | parts["heads"], wanted) | problems
    files = {f.name: f.stat().st_size for f in reader.files() if f.is_file()}
    return Contents(
        path=str(path),
        format=_nemo_format(context, parts),
        model=model,
        parameters=_parameters(info for name in ("model", "heads", "adapters") for info in parts[name].values()),
        dtypes=_dtypes(reader.tensors.values()),
        files=files,
        parts={name: len(tensors) for name, tensors in parts.items() if tensors},
        checked=checked,
        problems=problems,
        notes=notes,
    )


def _told(reader: torch_dist.Reader, given: Given) -> tuple[described.Model | None, list[str]]:
    """(which model NeMo, Megatron-Bridge or Megatron-LM says that it is, what to say); None if Slipway says it."""
    own = context_folder(reader.folder) / nemo_context.SOURCE_CONFIG
    weights = weights_of(reader)
    if other := of_fsdp(weights):
        return None, [other]
    if (own.is_file() and given.config is None) or not any(key.startswith("decoder.") for key in weights):
        return None, []
    if lora.has_adapters(reader) or any(key.startswith(ADAPTER) for key in weights):
        return None, []
    try:
        told = described.model_of(reader.folder, weights, given.config)
        check_stored(told.config, told.where, stored_bytes(reader.tensors))
        reader.adopt(told.family.rules(_as_stored(told.config, weights)).megatron)
    except (DataError, UsageError) as error:
        return None, [str(error)]
    padded = [key for key in VOCABULARY & reader.tensors.keys() if reader.cut_rows(key, told.config["vocab_size"])]
    said = [f"{key} has more rows than the vocabulary: they are left out" for key in sorted(padded)]
    return told, [f"made by {MADE_BY.get(told.where.name, 'another program')}", *told.notes, *said]


def _as_stored(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """Without layers for multi-token prediction where none are stored."""
    return config if any(key.startswith("mtp.") for key in tensors) else without_mtp(config)


def _parts(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    parts: dict[str, dict[str, TensorInfo]] = {"model": {}, "heads": {}, "adapters": {}, "optimizer": {}}
    for key, info in tensors.items():
        part = "optimizer" if torch_dist.is_state(key) else "heads" if key.startswith(ADAPTER) else "model"
        parts["adapters" if part == "model" and lora.KEY.fullmatch(key) else part][key] = info
    return parts


def _misfit(reader: torch_dist.Reader, base: Mapping[str, TensorInfo | None], context: Path) -> dict[str, list[str]]:
    """What is wrong with low-rank adapters for this base, if anything is."""
    infos = {key: info for key, info in base.items() if info}
    try:
        lora.Adapters(reader, infos, context / nemo_context.SOURCE_CONFIG)
    except DataError as error:
        return {"adapters": [str(error)]}
    return {}


def _nemo_format(context: Path, parts: Mapping[str, Any]) -> str:
    kind = "NeMo checkpoint" if context.is_dir() else "torch_dist weights"
    if (parts["heads"] or parts["adapters"]) and not parts["model"]:
        kind += " of low-rank adapters" if parts["adapters"] else " of trained heads"
    return f"{kind} with the optimizer's state" if parts["optimizer"] else kind


def _wanted_by_nemo(
    context: Path, parts: Mapping[str, Mapping[str, TensorInfo]], told: described.Model | None
) -> tuple[dict[str, TensorInfo | None], str, str]:
    """(name → what there must be, None = any shape; what says so; the name of the model)."""
    if told is not None:
        rules = told.family.rules(_as_stored(told.config, parts["model"]))
        return {**rules.megatron}, told.where.name, str(told.config["model_type"])
    path = context / nemo_context.SOURCE_CONFIG
    config = read_config(path) if path.is_file() else {}
    model = _model_name(config) or _nemo_class(context)
    heads = dict.fromkeys(f"{ADAPTER}{name}" for name in HEADS) if parts["heads"] else {}
    if heads and not parts["model"]:
        return heads, "the heads' names", model
    if not _known(config):
        return {}, "", model
    family, known = understood(config, path)
    wanted: dict[str, TensorInfo | None] = {**family.rules(known).megatron}
    return wanted | heads, f"context/{path.name}", model


def _nemo_class(context: Path) -> str:
    """The model's class in model.yaml; "" if there is none."""
    try:
        lines = (context / "model.yaml").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("_target_:")).rpartition(".")[2]
    except (OSError, ValueError, StopIteration):
        return ""


def _files_problems(folder: Path, extents: Mapping[str, int]) -> dict[str, list[str]]:
    sizes = {name: (folder / name).stat().st_size for name in extents if (folder / name).is_file()}
    short = [
        f"{name} ({size} of {extents[name]} bytes)" for name, size in sorted(sizes.items()) if size < extents[name]
    ]
    return _only_filled({"missing files": sorted(extents.keys() - sizes.keys()), "incomplete files": short})


# ---------------------------------------------------------------------------- counting and comparing


def _known(config: Mapping[str, Any]) -> bool:
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in by_model_type()


def _parameters(infos: Iterable[TensorInfo]) -> int:
    return sum(math.prod(info.shape) for info in infos)


def _dtypes(infos: Iterable[TensorInfo]) -> dict[str, tuple[int, int]]:
    """dtype → (tensors, bytes), the largest first."""
    counts: dict[str, tuple[int, int]] = {}
    for info in infos:
        count, size = counts.get(info.dtype, (0, 0))
        counts[info.dtype] = (count + 1, size + info.bytes)
    return dict(sorted(counts.items(), key=lambda item: -item[1][1]))


def _compare(found: Iterable[str], wanted: Iterable[str]) -> dict[str, list[str]]:
    found, wanted = set(found), set(wanted)
    return _only_filled({"missing": sorted(wanted - found), "unexpected": sorted(found - wanted)})


def _compare_infos(found: Mapping[str, TensorInfo], wanted: Mapping[str, TensorInfo | None]) -> dict[str, list[str]]:
    """Missing and unexpected names, and the tensors of a wrong shape or of a dtype that no command reads."""
    misshapen = [
        f"{name} {list(found[name].shape)}, expected {list(info.shape)}"
        for name, info in wanted.items()
        if info and name in found and found[name].shape != info.shape
    ]
    unread = [
        f"{name} {found[name].dtype}" for name in wanted if name in found and found[name].dtype not in rules.FLOATS
    ]
    return _compare(found, wanted) | _only_filled({"wrong shape": misshapen, "of a dtype that is not read": unread})


def _only_filled(problems: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {kind: names for kind, names in problems.items() if names}
