"""The `context/` folder of a NeMo 2 checkpoint, written without importing NeMo, which takes 25 seconds.

io.json is Fiddle's serialisation of the calls that rebuild the model: `GPTOSSModel(config=GPTOSSConfig(...),
tokenizer=AutoTokenizer(...))`. NeMo's `load_context(path, subpath="model")` reads it. model.yaml says the same for
people. The Hugging Face config.json is kept beside them, so that export can restore it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.families.decoder import Symbol

TOKENIZER = "nemo_tokenizer"
TOKENIZER_CLASS = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer:AutoTokenizer"
SOURCE_CONFIG = "hf_config.json"
HF_FILES = "hf_files"  # the other files of the source, which export restores


@dataclass(frozen=True)
class Call:
    """`target(**arguments)`, target as "module:name"."""

    target: str
    arguments: Mapping[str, Any]


class _Graph:
    """Fiddle's JSON form of a tree of calls: every call and every container is an object with a key."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}

    def call(self, call: Call, path: str) -> dict[str, str]:
        """Add a call; returns the reference to it."""
        items = [[f"Attr(name={name!r})", self.value(v, f"{path}.{name}")] for name, v in call.arguments.items()]
        names = [[f"Index(index={i})", name] for i, name in enumerate(call.arguments)]
        about = [
            ["Attr(name='fn_or_cls')", _symbol(call.target)],
            ["Attr(name='argument_names')", self._add("tuple", _node("builtins:tuple", names))],
            [
                "Attr(name='argument_tags')",
                self._add("dict", _node("builtins:dict", [], _node("builtins:tuple", []))),
            ],
            [
                "Attr(name='argument_history')",
                self._add("dict", _node("builtins:dict", [], _node("builtins:tuple", []))),
            ],
        ]
        kind = "fiddle._src.config:BuildableTraverserMetadata"
        metadata = self._add("metadata", _node(kind, about, _symbol(kind)))
        key = call.target.partition(":")[2].lower()
        return self._add(key, _node("fiddle._src.config:Config", items, metadata, [path]))

    def value(self, value: Any, path: str) -> dict[str, Any]:
        """The JSON form of an argument: a call, a symbol, a list or tuple of plain values, or a plain value."""
        if isinstance(value, Call):
            return self.call(value, path)
        if isinstance(value, Symbol):
            return _symbol(value.target)
        if isinstance(value, (list, tuple)):
            items = [[f"Index(index={i})", _leaf(v, f"{path}[{i}]")] for i, v in enumerate(value)]
            kind = type(value).__name__
            return self._add(kind, _node(f"builtins:{kind}", items, None, [path]))
        return _leaf(value, path)

    def _add(self, kind: str, node: dict[str, Any]) -> dict[str, str]:
        key = f"{kind}_{len(self.objects) + 1}"
        self.objects[key] = node
        return {"type": "ref", "key": key}

    def json(self, root: dict[str, str]) -> bytes:
        """The content of the file."""
        text = json.dumps([root, self.objects])
        counts = {key: text.count(f'"key": "{key}"') for key in self.objects}
        whole = {"root": root, "objects": self.objects, "refcounts": counts, "version": "0.0.1"}
        return json.dumps(whole, indent=1).encode()


def _symbol(target: str) -> dict[str, str]:
    module, name = target.split(":")
    return {"type": "pyref", "module": module, "name": name}


def _leaf(value: Any, path: str) -> dict[str, Any]:
    return {"type": "leaf", "value": value, "paths": [path]}


def _node(kind: str, items: list, metadata: Any = None, paths: list[str] | None = None) -> dict[str, Any]:
    node = {"type": _symbol(kind), "items": items, "metadata": metadata}
    return node if paths is None else {**node, "paths": paths}


def context_files(
    model: str,
    config: str,
    fields: Mapping[str, Any],
    hf_config: Mapping[str, Any],
    transform: Call | None = None,
    tokenizer: bool = True,
) -> dict[str, bytes]:
    """io.json, model.yaml and the source's config.json.

    Args:
        model, config: NeMo's classes, as "module:name".
        fields: the arguments of the configuration class.
        hf_config: config.json of the BF16 form.
        transform: what NeMo attaches to the model, if this is a checkpoint of adapters.
        tokenizer: there is one in the folder TOKENIZER.
    """
    # The defaults of NeMo's classes are float32, whatever the checkpoint holds.
    bf16 = Symbol("torch:bfloat16")
    fields = {**fields, "bf16": True, "params_dtype": bf16, "pipeline_dtype": bf16}
    arguments = {"config": Call(config, fields)}
    if tokenizer:
        arguments["tokenizer"] = Call(TOKENIZER_CLASS, {"pretrained_model_name": TOKENIZER})
    if transform:
        arguments["model_transform"] = transform
    graph = _Graph()
    root = graph.call(
        Call(
            "nemo.lightning.io.pl:TrainerContext",
            # None: NeMo's tools that load the whole context need the name, and make a trainer of their own.
            {"model": Call(model, arguments), "trainer": None},
        ),
        "<root>",
    )
    return {
        "io.json": graph.json(root),
        "model.yaml": _yaml(model, config, fields) + (_yaml_of(transform) if transform else b""),
        SOURCE_CONFIG: (json.dumps(hf_config, indent=2) + "\n").encode(),
    }


def has_tokenizer(checkpoint: Path) -> bool:
    """A NeMo checkpoint holds a tokenizer. config.json, by which transformers finds one without a class, is none."""
    return any(file.name != "config.json" for file in (checkpoint / "context" / TOKENIZER).glob("*"))


def _yaml(model: str, config: str, fields: Mapping[str, Any]) -> bytes:
    lines = [f"_target_: {_dotted(model)}", "config:", f"  _target_: {_dotted(config)}"]
    for name, value in sorted(fields.items()):
        lines.append(f"  {name}: {_dotted(value.target) if isinstance(value, Symbol) else json.dumps(value)}")
    return ("\n".join(lines) + "\n").encode()


def _yaml_of(transform: Call) -> bytes:
    lines = ["model_transform:", f"  _target_: {_dotted(transform.target)}"]
    for name, value in transform.arguments.items():
        items = [f"  - {json.dumps(item)}" for item in value] if isinstance(value, list) else []
        lines += [f"  {name}:" + ("" if items else f" {json.dumps(value)}"), *items]
    return ("\n".join(lines) + "\n").encode()


def _dotted(target: str) -> str:
    return target.replace(":", ".")
