"""`slipway version`: what this installation is made of."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import slipway

LIBRARIES = (
    "torch",
    "triton",
    "transformers",
    "safetensors",
    "numpy",
    "nvidia-nccl-cu13",
    "nvidia-cudnn-cu13",
)


@dataclass
class Versions:
    """Component → {"version", "commit" where it is built from git, "pinned" where it is not installed}."""

    components: dict[str, dict[str, str]]

    def __str__(self) -> str:
        width = max(map(len, self.components)) + 2
        return "\n".join(f"{name:{width}}{' '.join(_words(entry))}" for name, entry in self.components.items())

    def as_dict(self) -> dict[str, Any]:
        return self.components


def version() -> Versions:
    """Print the versions and commits of everything pinned."""
    components = {
        "slipway": {"version": slipway.__version__},
        "python": {"version": platform.python_version()},
    }
    pins = tomllib.loads((Path(__file__).parents[1] / "pins.toml").read_text())
    for name, pin in pins.items():
        components[name] = {**_installed(pin["distribution"], pin["version"]), "commit": pin["commit"]}
    for name in LIBRARIES:
        components[name] = _installed(name)
    return Versions(components)


def _installed(distribution: str, pinned: str = "") -> dict[str, str]:
    try:
        return {"version": importlib.metadata.version(distribution)}
    except importlib.metadata.PackageNotFoundError:
        return {"version": "not installed", **({"pinned": pinned} if pinned else {})}


def _words(entry: dict[str, str]) -> list[str]:
    return [entry["version"], *(f"{key} {value}" for key, value in entry.items() if key != "version")]
