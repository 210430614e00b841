"""Which model a Megatron checkpoint is, from its own files, read as data: nothing that they name is called.

| file | made by |
|---|---|
| context/hf_config.json | `slipway import`, and training from it |
| context/io.json, context/model.yaml | NeMo 2 |
| run_config.yaml | Megatron-Bridge |
| common.pt, with `args` | Megatron-LM |

The first is config.json itself. The others have the fields of Megatron's configuration, which a family understands
(families/described.py). The user's --config goes before all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.checkpoint import archive, handover
from slipway.checkpoint.nemo_context import SOURCE_CONFIG
from slipway.checkpoint.torch_dist import UNREADABLE
from slipway.errors import DataError
from slipway.families import Family, described_model, read_config, understood
from slipway.families.described import GIVE, Described, bounded
from slipway.tensors.refs import TensorInfo
from slipway.untrusted import NotYaml, open_file, parse_yaml, read_text, unreadable

BRIDGE = "run_config.yaml"
COMMON = "common.pt"
LARGEST_YAML = 1 << 18  # NeMo and Megatron-Bridge write some 30,000 bytes
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Model:
    """Which model a checkpoint is.

    Args:
        config: config.json, in its canonical form.
        where: the file that says it.
        fields: what it says in Megatron's fields; None where it is config.json itself.
    """

    family: Family
    config: dict[str, Any]
    where: Path
    fields: Described | None = None

    @property
    def notes(self) -> list[str]:
        """What a person should know of it."""
        if self.fields is None:
            return []
        said = [f"config.json is made from {self.where.name}, which has no token numbers of its own"]
        if not self.fields.get("max_position_embeddings"):
            said.append(f"max_position_embeddings is seq_length of {self.where.name}; {GIVE} if the model's is longer")
        if not self.fields.get("vocab_size"):
            said.append(f"{self.where.name} does not say vocab_size: all {self.fields.rows} rows are kept")
        return said


def model_of(folder: Path, tensors: Mapping[str, TensorInfo], given: Path | None = None) -> Model:
    """Which model a checkpoint is.

    Args:
        folder: of its weights.
        tensors: Megatron's key → TensorInfo, as stored.
        given: config.json of the user.

    Errors: DataError where no file says it, or where one is damaged.
    """
    source = given or folder.parent / "context" / SOURCE_CONFIG
    if source.is_file():
        family, config = understood(read_config(source), source)
        return Model(family, config, source)
    rows = next(iter(tensors[EMBEDDING].shape), None) if EMBEDDING in tensors else None
    for where, fields in _said(folder):
        described = Described(fields, where, rows)
        return Model(*described_model(described, tensors), where, described)
    raise DataError(
        f"{folder} does not say which model it is: there is no {SOURCE_CONFIG} or io.json in context/, no {BRIDGE}, "
        f"and no args in {COMMON}; {GIVE}"
    )


def _said(folder: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """(file, Megatron's fields in it), the first that is there."""
    context = folder.parent / "context"
    # io.json is what NeMo reads, but it may lack fields that have the default of NeMo's class; model.yaml has all.
    all_fields = _yaml(path, "config") if (path := context / "model.yaml").is_file() else {}
    if (calls := context / "io.json").is_file():
        yield calls, {**all_fields, **handover.fields_of(calls)}
    if all_fields:
        yield path, all_fields
    if (path := folder / BRIDGE).is_file():
        yield path, _yaml(path, "model")
    if (path := folder / COMMON).is_file() and (args := arguments_in(path)):
        yield path, args


def _yaml(path: Path, section: str) -> dict[str, Any]:
    """A table of a YAML file, with names for what is a function or a dtype."""
    try:
        whole = parse_yaml(read_text(path, LARGEST_YAML, "copy the checkpoint again"))
        return {name: _value(value) for name, value in whole[section].items()}
    except (NotYaml, LookupError, TypeError, AttributeError, ValueError):
        raise DataError(f"{path} is damaged: it has no table {section}; copy the checkpoint again") from None


def _value(value: Any) -> Any:
    """A plain value; of {_target_: module.name, …} the name."""
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)  # 1e-05, which YAML 1.1 takes for a text
    return value.get("_target_") if isinstance(value, dict) else value


def arguments_in(path: Path) -> dict[str, Any]:
    """Megatron-LM's arguments in a common.pt, or a file of the classic layout; empty where there are none."""
    try:
        with open_file(path) as file:
            found = archive.load_plain(file.fileno(), os.fstat(file.fileno()).st_size)
    except (OSError, *UNREADABLE) as error:
        raise unreadable(path, error, "copy the checkpoint again") from None
    return arguments_of(found)


def arguments_of(saved: Any) -> dict[str, Any]:
    """The fields of `args` in what torch.save has saved; names for what is a class or a member of an enumeration."""
    arguments = saved.get("args") if isinstance(saved, dict) else None
    fields = getattr(arguments, "__dict__", None) or {}
    kinds = (int, float, str, list, tuple, type(None))
    return {name: bounded(value) for name, value in fields.items() if isinstance(value, kinds)}
