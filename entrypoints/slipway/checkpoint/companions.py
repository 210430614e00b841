"""What goes along with a model's weights: tokenizer, chat templates, generation config, code.

Files are copied as they are, except tokenizer_config.json: transformers 5 writes classes and lists there that the
pinned transformers 4 does not read. Both read the form of 4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slipway.errors import DataError
from slipway.untrusted import read_object

MODELOPT_FILE = "hf_quant_config.json"
# What says in which form the weights were quantised: they are written in BF16.
OF_QUANTIZATION = (MODELOPT_FILE, "quantize_config.json", "quant_config.json")
# Of an adapter of peft that lies beside the model: whatever has it, transformers loads as that adapter on its base.
ADAPTER = "adapter_config.json"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
# The sub-folders that transformers writes. Others hold the same weights in other formats.
SUBFOLDERS = ("additional_chat_templates", "custom_generate")
TOKENIZER = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template", SUBFOLDERS[0])
OTHERS = ("generation_config.json", "preprocessor_config.json", "processor_config.json", SUBFOLDERS[1])
OF_A_MODEL = (*TOKENIZER, *OTHERS, "LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
TOKENIZER_CONFIG = "tokenizer_config.json"
# transformers 5's classes for any tokenizer.json → the class of 4.
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast", "PythonBackend": "PreTrainedTokenizer"}

# Given add_prefix_space, transformers 4 makes these anew from tokenizer.model, which transformers 5 does not write.
FROM_MODEL = ("LlamaTokenizer", "LlamaTokenizerFast")


@dataclass(frozen=True)
class Companions:
    """The files beside the weights, by their path in the model's folder.

    copies: those that stay as they are, with their source; small: those with another content; left_out: sub-folders
    that stay behind.
    """

    copies: Mapping[str, Path] = field(default_factory=dict)
    small: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()

    def under(self, folder: str) -> Companions:
        """The same with paths below a folder."""
        copies = {f"{folder}/{name}": source for name, source in self.copies.items()}
        return Companions(copies, {f"{folder}/{name}": content for name, content in self.small.items()})

    def of_tokenizer(self) -> Companions:
        """What the tokenizer needs."""
        return self._beginning_with(TOKENIZER)

    @property
    def has_tokenizer(self) -> bool:
        tokenizer = self.of_tokenizer()
        return bool(tokenizer.copies or tokenizer.small)

    def of_a_model(self) -> Companions:
        """What belongs to a model whatever else lies in its folder."""
        return self._beginning_with(OF_A_MODEL)

    def _beginning_with(self, names: tuple[str, ...]) -> Companions:
        copies = {name: source for name, source in self.copies.items() if name.startswith(names)}
        return Companions(copies, {name: text for name, text in self.small.items() if name.startswith(names)})


def companions_of(folder: Path | None) -> Companions:
    """Everything beside the weights and config.json; nothing where there is no such folder.

    Errors: DataError for a tokenizer_config.json that is not JSON.
    """
    if folder is None or not folder.is_dir():
        return Companions()
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and _goes_along(file)]
    for name in SUBFOLDERS:
        files += [file for file in sorted((folder / name).rglob("*")) if file.is_file() and _goes_along(file)]
    copies = {str(file.relative_to(folder)): file for file in files}
    small = {}
    if TOKENIZER_CONFIG in copies and (changed := _readable_by_both(copies[TOKENIZER_CONFIG])):
        del copies[TOKENIZER_CONFIG]
        small[TOKENIZER_CONFIG] = changed
    others = (entry.name for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] not in "._")
    return Companions(copies, small, tuple(f"{name}/" for name in others if name not in SUBFOLDERS))


def _goes_along(file: Path) -> bool:
    others = ("config.json", ADAPTER, *OF_QUANTIZATION)
    return file.name not in others and not file.name.endswith(WEIGHTS) and file.name[0] != "."


def _readable_by_both(file: Path) -> bytes | None:
    """tokenizer_config.json in the form of transformers 4; None where it has that form already."""
    config = read_object(file)
    changed = dict(config)
    if isinstance(name := changed.get("tokenizer_class"), str) and name in CLASSES:
        changed["tokenizer_class"] = CLASSES[name]
        changed.pop("backend", None)
    alone = changed.get("tokenizer_class") in FROM_MODEL and not (file.parent / "tokenizer.model").is_file()
    if alone and changed.get("add_prefix_space") is True:  # the default of both, and in tokenizer.json
        del changed["add_prefix_space"]
    if isinstance(more := changed.get("extra_special_tokens"), list):
        del changed["extra_special_tokens"]
        known = changed.get("additional_special_tokens") or []
        if not isinstance(known, list):
            raise DataError(f"{file}: additional_special_tokens is not a list; download it again")
        changed["additional_special_tokens"] = [*known, *(token for token in more if token not in known)]
    return None if changed == config else (json.dumps(changed, indent=2, ensure_ascii=False) + "\n").encode()
