"""What NeMo and Megatron import and compile when they are imported, less what no run needs.

Call `import_less` before either of them is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from slipway.training.patches import TORCH, replace

UNUSED = (
    # A client for object stores, through which Megatron would open every file and count each of the many small reads of
    # a checkpoint's metadata.
    "multistorageclient",
    # Of which transformers wants one function to generate text with a second model.
    "sklearn",
)


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


# Packages that are always imported and seldom used, with what is always taken from each. Megatron and NeMo import
# wandb, which a run uses with --wandb-project. Lightning asks what is a metric, and takes that from where it can be
# imported first: torchmetrics.metric and torchmetrics.utilities import each other.
SELDOM_USED: dict[str, dict[str, Callable[[], Any]]] = {
    "wandb": {},
    "torchmetrics": {
        "Metric": _from("torchmetrics.utilities.checks", "Metric"),
        "MetricCollection": _from("torchmetrics.collections", "MetricCollection"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
}


def import_less() -> None:
    """Compile nothing, leave out packages that are not used, and import others when they are. May be called again."""
    compile_nothing()
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # an import of it raises ModuleNotFoundError
    for name, parts in SELDOM_USED.items():
        import_later(name, parts)


def compile_nothing() -> None:
    """Keep Megatron from compiling an allocator for inference when it is imported, which takes 14 to 18 seconds.

    Megatron takes the refusal for a machine that has no compiler.
    """
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("training needs no CUDA extension that is compiled when it starts")

    replace(cpp_extension, "load_inline", refuse, TORCH)


def import_later(name: str, parts: Mapping[str, Callable[[], Any]]) -> None:
    """Let a package's own code run at the first use of anything in it. Nothing changes where it is imported already.

    Args:
        parts: what can be had without that, and how.
    """
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    module.__dict__["__parts__"] = dict(parts)
    module.__class__ = _Later


class _Later(ModuleType):
    """A package whose own code has not run yet; modules in it are imported without it if it has parts.

    importlib's LazyLoader runs it even for who only asks whether the package is installed.
    """

    def __getattribute__(self, name: str) -> Any:
        there = super().__getattribute__("__dict__")
        parts = there["__parts__"]
        if name in there and (name != "__path__" or parts):
            return there[name]
        if name.startswith("__") and name != "__path__":
            return super().__getattribute__(name)
        if name in parts:
            return parts[name]()
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
