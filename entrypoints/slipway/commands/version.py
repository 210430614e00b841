"""`slipway version`: what this installation is made of."""

from __future__ import annotations

import importlib.metadata
import json
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


# In an image: what it was built from, which need not be the general pins.
BUILT_FROM = Path(__file__).parents[3] / "pins.json"


@dataclass
class Versions:
    """Component → {"version", its origin ("commit", "archive" or "context"), "pinned" where it is not installed}."""

    components: dict[str, dict[str, str]]

    def __str__(self) -> str:
        width = max(map(len, self.components)) + 2
        return "\n".join(f"{name:{width}}{' '.join(_words(entry))}" for name, entry in self.components.items())

    def as_dict(self) -> dict[str, Any]:
        return self.components


def version() -> Versions:
    """Print the versions of everything pinned, and in an image what each part was built from."""
    components = {
        "slipway": {"version": slipway.__version__},
        "python": {"version": platform.python_version()},
    }
    pins = tomllib.loads((Path(__file__).parents[1] / "pins.toml").read_text("utf-8"))
    built = json.loads(BUILT_FROM.read_text()) if BUILT_FROM.exists() else None
    for name, pin in pins.items():
        components[name] = {**_installed(pin["distribution"], pin["version"]), **_origin(name, pin, built)}
    for name in LIBRARIES:
        components[name] = _installed(name)
    return Versions(components)


def _origin(name: str, pin: dict[str, Any], built: dict[str, str] | None) -> dict[str, str]:
    """Where a source comes from: the pin in a checkout, and in an image what its pins.json says.

    That is "VERSION COMMIT", "VERSION ARCHIVE sha256:…" or "context NAME".
    """
    if built is None:
        return {"commit": pin["commit"]}
    first, *rest = built.get(name, "").split() or [""]
    if first == "context":
        return {"context": " ".join(rest)}
    if not rest:  # this variant is built without it
        return {}
    return {"commit": rest[0]} if len(rest) == 1 else {"archive": " ".join(rest)}


def _installed(distribution: str, pinned: str = "") -> dict[str, str]:
    try:
        return {"version": importlib.metadata.version(distribution)}
    except importlib.metadata.PackageNotFoundError:
        return {"version": "not installed", **({"pinned": pinned} if pinned else {})}


def _words(entry: dict[str, str]) -> list[str]:
    return [entry["version"], *(f"{key} {value}" for key, value in entry.items() if key != "version")]
