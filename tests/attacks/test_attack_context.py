"""Code in context/io.json.

What it does: the context of a NeMo checkpoint names Python callables, which NeMo imports and calls to build the model.
A foreign one names subprocess.getoutput, or asks the tokenizer to run code, or to read elsewhere, or is endless.

What must happen: exit code 65 and one line that says what is named, before NeMo is imported; nothing is called.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from arena import run_that_goes_on
from slipway.checkpoint import handover
from slipway.errors import DataError
from slipway.families import FAMILIES, fabricate

Node = dict[str, Any]


def calls(context: Node) -> list[Node]:
    """The names of everything that is called."""
    return [
        item[1]
        for value in context["objects"].values()
        for item in value["items"]
        if item[0] == "Attr(name='fn_or_cls')"
    ]


def every(value: Any, kind: str) -> Iterator[Node]:
    if isinstance(value, dict):
        if value.get("type") == kind:
            yield value
        for each in value.values():
            yield from every(each, kind)
    elif isinstance(value, list):
        for each in value:
            yield from every(each, kind)


def argument(context: Node, path: str) -> Node:
    """The leaf at a path such as <root>.model.config.num_layers."""
    return next(leaf for leaf in every(context, "leaf") if path in leaf["paths"])


def with_argument(context: Node, owner: str, name: str, value: Any) -> None:
    """Give a call one more argument."""
    call = next(v for v in context["objects"].values() if owner in v.get("paths", ()))
    about = context["objects"][call["metadata"]["key"]]
    names = context["objects"][about["items"][1][1]["key"]]["items"]
    names.append([f"Index(index={len(names)})", name])
    call["items"].append([f"Attr(name={name!r})", value])


GETOUTPUT = {"module": "subprocess", "name": "getoutput"}


def retargeted(number: int) -> Callable[[Node], None]:
    return lambda context: calls(context)[number].update(GETOUTPUT)


def leaf(value: Any) -> Node:
    return {"type": "leaf", "value": value, "paths": []}


def value_of(path: str, value: Any) -> Callable[[Node], None]:
    return lambda context: argument(context, path).update(value=value)


def added(owner: str, name: str, value: Any) -> Callable[[Node], None]:
    return lambda context: with_argument(context, owner, name, value)


def first(context: Node) -> Node:
    return next(iter(context["objects"].values()))


def unreached(context: Node) -> None:
    """NeMo looks up the class of every object that has no path, whether or not the model refers to it."""
    context["objects"]["more"] = {"type": {"type": "pyref", **GETOUTPUT}, "items": [], "metadata": None}


def endless(context: Node) -> None:
    context["objects"]["more"] = {**first(context), "items": [["", {"type": "ref", "key": "more"}]]}
    with_argument(context, "<root>.model.config", "window_size", {"type": "ref", "key": "more"})


def doubled(context: Node) -> None:
    """Lists of lists of one another: 2^60 elements."""
    kind = {"type": "pyref", "module": "builtins", "name": "list"}
    for level in range(60):
        ref = {"type": "ref", "key": f"level{level - 1}"} if level else leaf(1)
        context["objects"][f"level{level}"] = {"type": kind, "items": [["0", ref], ["1", ref]], "metadata": None}
    with_argument(context, "<root>.model.config", "window_size", {"type": "ref", "key": "level59"})


def twice(context: Node) -> None:
    model = next(value for value in context["objects"].values() if "<root>.model" in value.get("paths", ()))
    context["objects"]["another"] = json.loads(json.dumps(model))


def tagged(context: Node) -> None:
    about = next(v for v in context["objects"].values() if v["items"] and v["items"][0][0] == "Attr(name='fn_or_cls')")
    about["items"][2][1] = {"type": "pyref", **GETOUTPUT}


def layers(name: str, argument: Any) -> Callable[[Node], None]:
    """What builds the layers, as NeMo notes it of DeepSeek: a partial call."""

    def change(context: Node) -> None:
        of = {name: {"type": "pyref", "module": module, "name": kind} for name, module, kind in (
            ("tuple", "builtins", "tuple"), ("dict", "builtins", "dict"),
            ("about", "fiddle._src.config", "BuildableTraverserMetadata"), ("call", "fiddle._src.partial", "Partial"),
        )}  # fmt: skip
        context["objects"] |= {
            "l_names": {"type": of["tuple"], "items": [["Index(index=0)", "use_transformer_engine"]], "metadata": None},
            "l_none": {"type": of["dict"], "items": [], "metadata": None},
        }
        parts = [{"type": "ref", "key": key} for key in ("l_names", "l_none", "l_none")]
        names = ("fn_or_cls", "argument_names", "argument_tags", "argument_history")
        about = [symbol("megatron.core.models.gpt.gpt_layer_specs", name), *parts]
        items = [[f"Attr(name={name!r})", part] for name, part in zip(names, about, strict=True)]
        context["objects"]["l_about"] = {"type": of["about"], "items": items, "metadata": of["about"]}
        context["objects"]["l_call"] = {
            "type": of["call"],
            "items": [["Attr(name='use_transformer_engine')", argument]],
            "metadata": {"type": "ref", "key": "l_about"},
            "paths": [f"{CONFIG}.transformer_layer_spec"],
        }
        with_argument(context, CONFIG, "transformer_layer_spec", {"type": "ref", "key": "l_call"})

    return change


def symbol(module: str, name: str) -> Node:
    return {"type": "pyref", "module": module, "name": name, "paths": []}


CONFIG, TOKENIZER = "<root>.model.config", "<root>.model.tokenizer"
ATTACKS: dict[str, tuple[Callable[[Node], Any], str]] = {
    **{f"call {number} is another": (retargeted(number), "subprocess:getoutput") for number in range(4)},
    "builtins": (lambda c: calls(c)[1].update(module="builtins", name="eval"), "builtins:eval"),
    "a class of the same module": (lambda c: calls(c)[0].update(name="HFGPTOSSImporter"), "HFGPTOSSImporter"),
    "a name with dots": (lambda c: calls(c)[0].update(name="GPTOSSConfig.__init__"), "GPTOSSConfig.__init__"),
    "a value is a function": (added(CONFIG, "data_step_fn", symbol("os", "system")), "os:system"),
    "a value is an attribute": (added(CONFIG, "init_method", symbol("torch", "hub.load")), "torch:hub.load"),
    "an object of another class": (lambda c: first(c)["type"].update(module="x.y", name="Z"), "x.y:Z"),
    "a function of ours": (
        lambda c: calls(c)[1].update(module="slipway.training.start", name="run"),
        "slipway.training.start:run",
    ),
    "a partial": (
        lambda c: [o["type"].update(module="fiddle._src.partial", name="Partial") for o in c["objects"].values()],
        "fiddle._src.partial:Partial",
    ),
    "a partial of another function": (layers("get_mlp_module_spec", leaf(True)), "get_mlp_module_spec"),
    "a partial with an argument": (layers("get_gpt_decoder_block_spec", symbol("os", "system")), "os:system"),
    "a partial with a word": (layers("get_gpt_decoder_block_spec", leaf("x")), "has other arguments"),
    "an object that nothing refers to": (unreached, "subprocess:getoutput"),
    "tags": (tagged, "subprocess:getoutput"),
    "two models": (twice, "2 models"),
    "a reference to itself": (endless, "without an end"),
    "lists of lists of one another": (doubled, "without an end"),
    "code of the tokenizer": (added(TOKENIZER, "trust_remote_code", leaf(True)), "run code"),
    "a tokenizer of the hub": (value_of(f"{TOKENIZER}.pretrained_model_name", "someone/else"), "someone/else"),
    "a tokenizer elsewhere": (value_of(f"{TOKENIZER}.pretrained_model_name", "../../x"), "../../x"),
    "a file of the tokenizer": (added(TOKENIZER, "vocab_file", leaf("/etc/passwd")), "vocab_file"),
    "a folder to write to": (added(CONFIG, "config_logger_dir", leaf("here")), "config_logger_dir"),
    "a path": (added(CONFIG, "activation", leaf("/etc/passwd")), "/etc/passwd"),
    "five million layers": (value_of(f"{CONFIG}.num_layers", 5_000_000), "num_layers is 5000000"),
    "a million experts": (value_of(f"{CONFIG}.num_moe_experts", 1_000_000), "num_moe_experts is 1000000"),
    "no objects": (lambda c: c.pop("objects"), "not a context"),
    "objects are a list": (lambda c: c.update(objects=[1]), "not a context"),
    "an item is no pair": (lambda c: first(c)["items"].append([1]), "not a context"),
    "control characters": (lambda c: calls(c)[0].update(name="\x1b]0;pwned\x07"), "\\x1b]0;pwned\\x07"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused(nemo, name):
    path = nemo / "context" / "io.json"
    context = json.loads(path.read_text())
    handover.check(nemo)
    ATTACKS[name][0](context)
    path.write_text(json.dumps(context))
    with pytest.raises(DataError) as error:
        handover.check(nemo)
    assert ATTACKS[name][1] in str(error.value) and "\n" not in str(error.value)


def test_what_nemo_notes_of_deepseeks_layers_is_taken(nemo):
    path = nemo / "context" / "io.json"
    context = json.loads(path.read_text())
    layers("get_gpt_decoder_block_spec", leaf(True))(context)
    path.write_text(json.dumps(context))
    handover.check(nemo)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_import_writes_is_taken(tmp_path, family):
    from slipway.commands.import_checkpoint import import_checkpoint

    fabricate.fabricate(tmp_path / "hf", FAMILIES[family].tiny_config(), ["some text"], quantized=False)
    import_checkpoint(str(tmp_path / "hf"), str(tmp_path / "nemo"))
    handover.check(tmp_path / "nemo")


def spoiled(nemo: Path, marker: Path) -> None:
    """A call that creates the marker if anybody makes it."""
    path = nemo / "context" / "io.json"
    context = json.loads(path.read_text())
    value = next(v for v in context["objects"].values() if TOKENIZER in v.get("paths", ()))
    value["items"][0][1]["value"] = f"touch {marker}"
    about = context["objects"][value["metadata"]["key"]]
    about["items"][0][1].update(GETOUTPUT)
    context["objects"][about["items"][1][1]["key"]]["items"][0][1] = "cmd"
    path.write_text(json.dumps(context))


def test_train_does_not_call_it(arena, nemo, samples, tmp_path):
    spoiled(nemo, tmp_path / "marker")
    found = arena.run("train", "--model", nemo, "--data", samples, "--out", tmp_path / "run")
    assert "subprocess:getoutput" in found.check(65, lines=None)
    assert not (tmp_path / "marker").exists() and not (tmp_path / "run").exists()


def test_verify_does_not_call_it(arena, nemo, nemo_model, tmp_path):
    spoiled(nemo, tmp_path / "marker")
    found = arena.run("verify", nemo_model, nemo, "--forward")
    assert "subprocess:getoutput" in found.check(65)
    assert not (tmp_path / "marker").exists()


def test_a_run_that_goes_on_does_not_call_it(arena, nemo, samples, tmp_path):
    words, newest = run_that_goes_on(arena, nemo, samples, tmp_path / "run")
    spoiled(newest, tmp_path / "marker")
    assert "step=2/context/io.json" in arena.run(*words).check(65, lines=None)
    assert not (tmp_path / "marker").exists()
