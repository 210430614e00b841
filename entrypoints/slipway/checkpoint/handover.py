"""What is checked of a NeMo checkpoint before NeMo sees it.

NeMo builds a model by calling what `context/io.json` names, and torch loads `.metadata` and every object that is not a
tensor as pickles, which call what they name. Here all of it is read as data first: a checkpoint that names anything but
the classes that such a checkpoint needs is refused, and NeMo is never asked.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slipway.checkpoint import archive, dcp
from slipway.checkpoint.lora import BASE_NOTE
from slipway.checkpoint.nemo_context import SOURCE_CONFIG, TOKENIZER, TOKENIZER_CLASS
from slipway.checkpoint.torch_dist import UNREADABLE, places_of, weights_folder
from slipway.errors import DataError
from slipway.families import FAMILIES, read_config, understood
from slipway.tensors.refs import TORCH_NAMES
from slipway.untrusted import harmless, open_file, read_bytes, read_object, unreadable

CURE = "import the model again, and use checkpoints of people whom you trust"
COPY = "copy the checkpoint again"
CONFIG, METADATA = "fiddle._src.config:Config", "fiddle._src.config:BuildableTraverserMetadata"
PARTIAL = "fiddle._src.partial:Partial"
CONTAINERS = ("builtins:list", "builtins:tuple", "builtins:dict")
ROOT, MODEL = "<root>", "<root>.model"
MODELOPT = "modelopt_state"  # a folder with a pickle, which NeMo loads without limits when it builds a model
MOST_CONTEXT_BYTES, MOST_OBJECT_BYTES = 64 << 20, 16 << 20
MOST_NODES = 200_000  # of the tree of calls; NeMo's own has some thousand
# What training itself notes of the optimizer and of what was attached to the model. None of it is built (see
# training/context.py); NeMo only looks the names up.
BESIDE_THE_MODEL = {
    "nemo.lightning.pytorch.optim.megatron:MegatronOptimizerModule",
    "nemo.lightning.pytorch.optim.lr_scheduler:CosineAnnealingScheduler",
    "megatron.core.optimizer.optimizer_config:OptimizerConfig",
    "nemo.collections.llm.peft.lora:LoRA",
    "nemo.collections.llm.peft.dora:DoRA",
    "nemo.collections.llm.peft.canonical_lora:CanonicalLoRA",
}
OURS = "slipway.training."  # what Slipway's own training attaches, and how its learning rate goes
# What builds Megatron's layers. Of DeepSeek's NeMo notes which arguments it gives: they are flags.
LAYERS = {
    "megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec",
    *(
        f"nemo.collections.llm.gpt.model.base:{name}_layer_spec"
        for name in ("default", "local", "transformer_engine", "transformer_engine_full")
    ),
}
# Values of a configuration's fields that are not numbers or words: dtypes, activations, what NeMo's classes have set.
VALUES = {
    *LAYERS,
    *(f"torch:{name}" for name in TORCH_NAMES.values()),
    *(f"torch.nn.functional:{name}" for name in ("silu", "gelu", "relu")),
    *(f"nemo.collections.llm.gpt.model.base:gpt_{name}_step" for name in ("data", "forward")),
    "megatron.core.transformer.enums:AttnBackend",
    *(f"megatron.core.transformer.enums:AttnBackend.{name}" for name in ("auto", "flash", "fused", "unfused", "local")),
}
# Of the parts of NeMo's context that are not read to build the model: who may have made them.
PACKAGES = ("builtins", "fiddle", "lightning", "megatron", "nemo", "nemo_run", "slipway", "torch")
HARMFUL = ("builtins",)  # of these only CONTAINERS: the package has eval and open too
WORD = re.compile(r"[\w.+-]{0,64}")  # the text of a field of a configuration: no path
PLACES = ("_dir", "_path", "_file")  # how fields end that say where to read or write
# Sizes that io.json must share with config.json: from these NeMo takes memory.
SIZES = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "num_moe_experts", "moe_ffn_hidden_size", "vocab_size",
)  # fmt: skip
OF_TOKENIZER = {"pretrained_model_name", "use_fast", "include_special_tokens", "trust_remote_code"}
OF_TOKENIZER |= {f"{name}_token" for name in ("mask", "bos", "eos", "pad", "sep", "cls", "unk")}


def check(checkpoint: Path) -> None:
    """DataError unless NeMo can be given this checkpoint: it names nothing but what a checkpoint needs."""
    check_context(checkpoint)
    check_weights(checkpoint)


# ---------------------------------------------------------------------------- the context


@dataclass(frozen=True)
class Called:
    """A call in the context: what is called ("module:name"), and its arguments."""

    target: str
    arguments: Mapping[str, Any]


def check_context(checkpoint: Path) -> None:
    """DataError unless the context of a checkpoint names only the classes of a model that Slipway knows."""
    path = checkpoint / "context" / "io.json"
    whole = read_object(path, MOST_CONTEXT_BYTES, CURE)
    try:
        model = _Context(whole).model()
    except _Refused as error:
        raise DataError(f"{path}: {harmless(str(error), 300)}; {CURE}") from None
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a context of NeMo ({type(error).__name__}); {CURE}") from None
    source = checkpoint / "context" / SOURCE_CONFIG
    if source.is_file():
        _check_sizes(path, model.arguments["config"], source)


def fields_of(path: Path) -> dict[str, Any]:
    """The fields of the model's configuration in a context's io.json, as data; names for functions, classes and dtypes.

    Nothing in it is refused: it is not handed to NeMo.
    """
    whole = read_object(path, MOST_CONTEXT_BYTES, CURE)
    try:
        fields = _Unchecked(whole).configuration()
    except (_Refused, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a context of NeMo ({type(error).__name__}); {CURE}") from None
    return {name: _named(value) if isinstance(value, (Called, _Named)) else value for name, value in fields.items()}


class _Refused(Exception):
    """Why a context is not handed to NeMo."""


@functools.cache
def classes() -> tuple[frozenset[str], frozenset[str]]:
    """(the families' model classes, the configuration classes of their modules in NeMo) that a context may call.

    Read from NeMo's files, because its import takes half a minute.
    """
    models, configs = set(), set()
    for family in FAMILIES.values():
        # What `import` writes is known without NeMo.
        tiny = understood(family.tiny_config(), Path("config.json"))[1]
        model, config, _ = family.nemo_model(tiny)
        models.add(model)
        configs.add(config)
        module = model.partition(":")[0]
        for name in re.findall(r"(?m)^class (\w+)\(", _source(module)):
            if re.search(r"Config\w*$", name):
                configs.add(f"{module}:{name}")
    return frozenset(models), frozenset(configs)


def _source(module: str) -> str:
    """The text of a module of NeMo; empty where NeMo is not installed."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        file = Path(place).joinpath(*parts).with_suffix(".py")
        if file.is_file():
            return file.read_text()
    return ""


class _Context:
    """Fiddle's JSON form of a tree of calls, as data. It raises what damaged data raises, and _Refused."""

    def __init__(self, whole: Mapping[str, Any]) -> None:
        self.root, self.objects = whole["root"], whole["objects"]
        self.left = MOST_NODES
        self._models, self._configs = classes()

    def model(self) -> Called:
        """The model's call, everything in the file checked."""
        at_model = [key for key, value in self.objects.items() if MODEL in value.get("paths", ())]
        if len(at_model) != 1 or self.root["type"] != "ref":
            raise _Refused(f"it has {len(at_model)} models")
        self._check_the_rest(self._reached(at_model[0]))
        model = self._value({"type": "ref", "key": at_model[0]}, 0)
        if not isinstance(model, Called) or model.target not in self._models:
            raise _Refused(f"it calls {_named(model)}, which is not a model that Slipway knows")
        config, tokenizer = model.arguments["config"], model.arguments.get("tokenizer")
        self._check_config(config)
        if tokenizer is not None:
            _check_tokenizer(tokenizer)
        for name, value in model.arguments.items():
            if name not in ("config", "tokenizer") and value is not None:
                _check_beside(value)
        return model

    def _check_config(self, config: Any) -> None:
        if not isinstance(config, Called) or config.target not in self._configs:
            raise _Refused(f"it calls {_named(config)}, which is not a configuration that Slipway knows")
        for name, value in config.arguments.items():
            if name.endswith(PLACES) and value:
                raise _Refused(f"{name} is {value!r}, a place to read or write")
            for part in _flat(value):
                if isinstance(part, Called) or (isinstance(part, _Named) and part.target not in VALUES):
                    raise _Refused(f"{name} is {part.target}, which is not on the list")
                if isinstance(part, str) and not WORD.fullmatch(part):
                    raise _Refused(f"{name} is {part!r}, which is not a word")

    # ------------------------------------------------------------------------ the tree

    def _value(self, value: Any, depth: int) -> Any:
        """A value with every reference replaced by what it refers to: a Called, a _Named, a container or a leaf."""
        self.left -= 1
        if self.left < 0 or depth > 40:
            raise _Refused("its calls are nested without an end")
        if not isinstance(value, dict):
            if isinstance(value, list):
                return [self._value(each, depth + 1) for each in value]
            return value
        kind = value["type"]
        if kind == "ref":
            return self._value(self.objects[value["key"]], depth + 1)
        if kind == "leaf":
            return value["value"]
        if kind == "pyref":
            return _Named(f"{value['module']}:{value['name']}")
        return self._object(value, _target(kind), depth)

    def _object(self, value: Mapping[str, Any], kind: str, depth: int) -> Any:
        items = [self._value(each, depth + 1) for _, each in value["items"]]
        if kind in CONTAINERS:
            return items
        if kind == METADATA:
            called, names, *others = items
            if not isinstance(called, _Named) or len(others) != 2 or any(others):
                raise _Refused("a call has tags or a history")
            return Called(called.target, dict.fromkeys(names))
        if kind not in (CONFIG, PARTIAL):
            raise _Refused(f"it has an object of {kind}, which is not on the list")
        about = self._value(value["metadata"], depth + 1)
        if kind == CONFIG:
            return Called(about.target, dict(zip(about.arguments, items, strict=True)))
        if _named(about) not in LAYERS or not all(isinstance(item, bool) for item in items):
            raise _Refused(f"it has a {kind} of {_named(about)}, which is not on the list or has other arguments")
        return _Named(about.target)

    def _reached(self, key: str) -> set[str]:
        """The objects that NeMo looks at to build the model: what has a path in it, and all that these refer to."""
        found = {key for key, value in self.objects.items() if any(MODEL in path for path in value.get("paths", ()))}
        todo = [key, *found]
        while todo:
            for other in _references(self.objects[todo.pop()]):
                if other not in found:
                    found.add(other)
                    todo.append(other)
        return found | {key}

    def _check_the_rest(self, reached: set[str]) -> None:
        """What is named elsewhere in the file is of packages that training uses; NeMo does not look at it."""
        known = {*self._models, *self._configs, *BESIDE_THE_MODEL, *VALUES, *CONTAINERS, CONFIG, PARTIAL, METADATA}
        known |= {TOKENIZER_CLASS, "nemo.lightning.io.pl:TrainerContext"}
        for key, value in self.objects.items():
            # Of what has no path NeMo looks the class up, whosever it is.
            strict = {_target(value["type"])} if "paths" not in value else set()
            for target in _targets(value):
                package = re.split(r"[.:]", target)[0]
                elsewhere = package in PACKAGES and package not in HARMFUL and key not in reached
                if target not in known and not target.startswith(OURS) and (target in strict or not elsewhere):
                    raise _Refused(f"it names {target}, which is not on the list")


class _Unchecked(_Context):
    """The same, where what is not on the lists is only a name."""

    def configuration(self) -> Mapping[str, Any]:
        """The arguments of the call of the model's configuration."""
        (at_model,) = (key for key, value in self.objects.items() if MODEL in value.get("paths", ()))
        items = dict(self.objects[at_model]["items"])
        return self._value(items["Attr(name='config')"], 0).arguments

    def _object(self, value: Mapping[str, Any], kind: str, depth: int) -> Any:
        try:
            return super()._object(value, kind, depth)
        except _Refused:
            return _Named(kind)


@dataclass(frozen=True)
class _Named:
    """A class, function or value that the context names."""

    target: str


def _target(reference: Mapping[str, Any]) -> str:
    if reference["type"] != "pyref":
        raise ValueError("not the name of a class")
    return f"{reference['module']}:{reference['name']}"


def _named(value: Any) -> str:
    return value.target if isinstance(value, (Called, _Named)) else repr(value)


def _parts(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every object of JSON in a value."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo += part.values()
        elif isinstance(part, list):
            todo += part


def _references(value: Any) -> Iterator[str]:
    return (part["key"] for part in _parts(value) if part.get("type") == "ref")


def _targets(value: Any) -> Iterator[str]:
    return (f"{part['module']}:{part['name']}" for part in _parts(value) if part.get("type") == "pyref")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    else:
        yield value


def _check_tokenizer(tokenizer: Any) -> None:
    """The tokenizer's files are those of the checkpoint, and no code of a model is run for it."""
    if not isinstance(tokenizer, Called) or tokenizer.target != TOKENIZER_CLASS:
        raise _Refused(f"it calls {_named(tokenizer)}, which is not NeMo's tokenizer")
    for name, value in tokenizer.arguments.items():
        if name == "pretrained_model_name" and value != TOKENIZER:
            raise _Refused(f"the tokenizer is {value!r}; it must be the checkpoint's own, {TOKENIZER}")
        if name == "trust_remote_code" and value:
            raise _Refused("the tokenizer asks to run code that is in its folder")
        if value not in (None, False, [], "") and name not in OF_TOKENIZER:
            raise _Refused(f"the tokenizer has {name}, which is not on the list")


def _check_beside(value: Any) -> None:
    for part in _flat(value):
        if isinstance(part, Called):
            if part.target not in BESIDE_THE_MODEL and not part.target.startswith(OURS):
                raise _Refused(f"it calls {part.target}, which is not on the list")
            _check_beside(list(part.arguments.values()))
        elif isinstance(part, _Named) and part.target not in VALUES:
            raise _Refused(f"it names {part.target}, which is not on the list")


def _check_sizes(path: Path, config: Called, source: Path) -> None:
    """DataError where io.json describes a larger or smaller model than config.json beside it."""
    family, known = understood(read_config(source), source)
    fields = family.nemo_model(known)[2]
    for name in SIZES:
        said, wanted = config.arguments.get(name), fields.get(name)
        if said is not None and wanted is not None and said != wanted:
            raise DataError(f"{path}: {name} is {harmless(repr(said), 40)}, but {source.name} says {wanted}; {CURE}")


# ---------------------------------------------------------------------------- the weights


def check_weights(checkpoint: Path) -> None:
    """DataError for pickles that torch would not have written, and for what cannot be read at all."""
    folder = weights_folder(checkpoint)
    _check_names(folder)
    read_object(folder / "metadata.json", 1 << 20, COPY)
    _check_common(folder / "common.pt")
    path = folder / ".metadata"
    try:
        metadata = dcp.loads(read_bytes(path, cure=COPY), known_only=True)
        places = places_of(metadata)
        objects = [key for key, entry in metadata.state_dict_metadata.items() if not hasattr(entry, "chunks")]
    except dcp.Unexpected as error:
        raise DataError(f"{path}: {harmless(str(error), 200)}; {CURE}") from None
    except UNREADABLE as error:
        raise unreadable(path, error, COPY) from None
    _check_objects(folder, objects, places)
    if (note := folder / BASE_NOTE).is_file():
        read_object(note, 1 << 20, COPY)


def _check_names(folder: Path) -> None:
    """Beside files there is nothing: what NeMo finds in a folder there, it loads as a pickle."""
    if os.path.lexists(folder / MODELOPT):
        raise DataError(
            f"{folder / MODELOPT}: ModelOpt has changed this model (quantised, pruned or distilled it), and NeMo would "
            "run any code that is in there; export the model to Hugging Face's layout with the tool that made it, and "
            "import that"
        )
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            raise DataError(f"{path} is a folder, where a checkpoint has files alone; {CURE}")


def _check_common(path: Path) -> None:
    """common.pt can be read: torch finds out only after NeMo's import."""
    if not path.exists():
        return
    try:
        with open_file(path) as file:
            archive.check_object(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise unreadable(path, error, COPY) from None
    except UNREADABLE as error:
        raise DataError(f"{path} is damaged ({_short(error)}); {COPY}") from None


def _check_objects(folder: Path, keys: list[str], places: Mapping[Any, Any]) -> None:
    """Every object that is not a tensor, which torch loads as a pickle without limits."""
    found = {key: where for (key, _), where in places.items()}
    seen: set[bytes] = set()  # Transformer Engine has tens of thousands, which are all the same
    with ExitStack() as opened:
        files: dict[str, BinaryIO] = {}
        for key in keys:
            name = found[key].relative_path if key in found else ""
            try:
                if name not in files:
                    files[name] = opened.enter_context(open_file(folder / name))
                _check_object(files[name].fileno(), found[key], seen, state="_extra_state" in key)
            except OSError as error:
                raise unreadable(folder / name, error, COPY) from None
            except UNREADABLE as error:
                raise DataError(
                    f"{folder / name}: the object {harmless(key, 100)} is not one of torch's ({_short(error)}); {CURE}"
                ) from None


def _check_object(descriptor: int, where: Any, seen: set[bytes], *, state: bool) -> None:
    if where.length > MOST_OBJECT_BYTES:
        raise ValueError("too large")
    content = os.pread(descriptor, where.length, where.offset)
    if content not in seen:
        archive.check_object(descriptor, where.offset, where.length, state=state)
        seen.add(content)


def _short(error: Exception) -> str:
    return harmless(str(error), 120) if isinstance(error, dcp.Unexpected) else type(error).__name__
