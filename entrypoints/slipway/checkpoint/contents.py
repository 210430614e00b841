"""What `inspect` says about a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slipway.errors import DataError
from slipway.report import human_bytes

SHOWN = 3  # names printed of a long list


@dataclass
class Contents:
    """What a checkpoint is.

    Args:
        path: the file or folder.
        format: in words.
        model: its `model_type`, else NeMo's class, else "".
        parameters: elements of the model's dequantised tensors, without the optimizer's.
        dtypes: dtype as stored → (tensors, bytes).
        files: file with tensors → bytes.
        parts: model, heads, optimizer → number of tensors.
        quantization: method, block size and number of tensors; None if it is not quantised.
        checked: what the tensors were compared with; "" if nothing says which tensors there must be.
        problems: kind of problem → names.
        notes: what a person should know of how it is read.
    """

    path: str
    format: str
    model: str
    parameters: int
    dtypes: dict[str, tuple[int, int]]
    files: dict[str, int]
    parts: dict[str, int] = field(default_factory=dict)
    quantization: dict[str, Any] | None = None
    checked: str = ""
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return not self.problems

    @property
    def exit_code(self) -> int:
        return 0 if self.whole else DataError.exit_code

    @property
    def tensors(self) -> int:
        return sum(count for count, _ in self.dtypes.values())

    def __str__(self) -> str:
        rows = [("format", self.format), ("model", self.model or "unknown"), ("parameters", f"{self.parameters:,}")]
        if len(self.parts) > 1:
            rows.append(("parts", ", ".join(f"{name} {count:,} tensors" for name, count in self.parts.items())))
        for number, (dtype, (count, size)) in enumerate(self.dtypes.items()):
            rows.append(("" if number else "dtypes", f"{dtype:8} {count:9,} tensors {human_bytes(size):>9}"))
        rows.append(("size", self._size()))
        if self.quantization:
            rows.append(("quantised", _quantization_words(self.quantization)))
        rows += [(kind, _shortened(names)) for kind, names in self.problems.items()]
        rows += [("note", note) for note in self.notes]
        rows.append(("complete", self._verdict()))
        width = max(16, *(len(label) for label, _ in rows)) + 1
        return "\n".join([self.path, *(f"{label:{width}}{text}" for label, text in rows)])

    def _size(self) -> str:
        total = human_bytes(sum(self.files.values()))
        if not self.files:
            return total
        name, largest = max(self.files.items(), key=lambda item: item[1])
        files = f"{len(self.files):,} files, the largest {name} with {human_bytes(largest)}"
        return f"{total} in " + (f"one file, {name}" if len(self.files) == 1 else files)

    def _verdict(self) -> str:
        if self.problems:
            return "no"
        if not self.checked:
            return "unknown: nothing here says which tensors there must be"
        return f"yes (compared with {self.checked})"

    def as_dict(self) -> dict[str, Any]:
        """The same as one JSON-ready object."""
        return {
            "command": "inspect",
            "path": self.path,
            "format": self.format,
            "model": self.model,
            "parameters": self.parameters,
            "tensors": self.tensors,
            "parts": self.parts,
            "dtypes": {dtype: {"tensors": count, "bytes": size} for dtype, (count, size) in self.dtypes.items()},
            "bytes": sum(self.files.values()),
            "files": len(self.files),
            "largest_file": max(self.files, key=self.files.__getitem__, default=""),
            "largest_file_bytes": max(self.files.values(), default=0),
            "quantization": self.quantization,
            "checked": self.checked,
            "problems": self.problems,
            "notes": self.notes,
            "whole": self.whole,
        }


def _quantization_words(about: Mapping[str, Any]) -> str:
    block = "×".join(map(str, about["block"]))
    return f"{about['method']}, {f'blocks of {block}, ' if block else ''}{about['tensors']:,} tensors"


def _shortened(names: list[str]) -> str:
    more = f", … ({len(names) - SHOWN:,} more)" if len(names) > SHOWN else ""
    return f"{len(names):,}: {', '.join(names[:SHOWN])}{more}"
