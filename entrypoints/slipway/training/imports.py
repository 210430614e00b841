"""What NeMo and Megatron import and compile when they are imported, less what no run needs.

Call `import_less` before either of them is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

from slipway.training.patches import TORCH, replace

# A client for object stores, through which Megatron would open every file and count each of the many small reads of a
# checkpoint's metadata.
UNUSED = "multistorageclient"
# Megatron and NeMo import it always, and a run uses it with --wandb-project.
SELDOM_USED = "wandb"


def import_less() -> None:
    """Compile nothing, leave out a package that is not used, and import another when it is. May be called again."""
    compile_nothing()
    sys.modules.setdefault(UNUSED, None)  # type: ignore[arg-type] # an import of it raises ModuleNotFoundError
    import_later(SELDOM_USED)


def compile_nothing() -> None:
    """Keep Megatron from compiling an allocator for inference when it is imported, which takes 14 to 18 seconds.

    Megatron takes the refusal for a machine that has no compiler.
    """
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("training needs no CUDA extension that is compiled when it starts")

    replace(cpp_extension, "load_inline", refuse, TORCH)


def import_later(name: str) -> None:
    """Let a package be imported at the first use of one of its parts. Nothing changes where it is imported already."""
    if name in sys.modules or (spec := importlib.util.find_spec(name)) is None:
        return
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    module.__class__ = _Later


class _Later(ModuleType):
    """A module whose code has not run yet.

    importlib's LazyLoader runs it even for who only asks whether the package is installed.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") and name != "__path__":
            return super().__getattribute__(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)
