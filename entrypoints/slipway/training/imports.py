"""What NeMo and Megatron import and compile when they are imported, less what no run needs.

Call `import_less` before either of them is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from slipway.training.patches import TORCH, replace

UNUSED = (
    # Quantises, prunes and distils models. A checkpoint with a state of its own is refused (checkpoint/handover.py).
    "modelopt",
    # A client for object stores, through which Megatron would open every file and count each of the many small reads of
    # a checkpoint's metadata.
    "multistorageclient",
    # Of which transformers wants one function to generate text with a second model.
    "sklearn",
)


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


def _module(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(name)


# Packages that are always imported and seldom used, with what is always taken from each. Megatron and NeMo import
# wandb, which a run uses with --wandb-project. Lightning asks what is a metric, and takes that from where it can be
# imported first: torchmetrics.metric and torchmetrics.utilities import each other. NeMo's llm imports every model that
# it has, BERT and T5 among them, and with these most of transformers, datasets and scipy.
SELDOM_USED: dict[str, dict[str, Callable[[], Any]]] = {
    "wandb": {},
    "torchmetrics": {
        "Metric": _from("torchmetrics.utilities.checks", "Metric"),
        "MetricCollection": _from("torchmetrics.collections", "MetricCollection"),
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
    "nemo.collections.llm": {
        "GPTModel": _from("nemo.collections.llm.gpt.model.base", "GPTModel"),
        "fn": _module("nemo.collections.llm.fn"),
        "peft": _module("nemo.collections.llm.peft"),
    },
    "nemo.collections.llm.gpt.model": {"GPTConfig": _from("nemo.collections.llm.gpt.model.base", "GPTConfig")},
    "nemo.collections.llm.gpt.data": {"fine_tuning": _module("nemo.collections.llm.gpt.data.fine_tuning")},
}

# Modules of NeMo's for what no run does, with the names that its other modules import from them. Classes have no
# instances here, and functions do nothing: with no state of ModelOpt's they would find nothing to do.
STAND_INS: dict[str, tuple[str, ...]] = {
    "nemo.collections.llm.modelopt": (
        "DistillationGPTModel",
        "ExportConfig",
        "PruningConfig",
        "QuantizationConfig",
        "Quantizer",
        "prune_language_model",
        "save_pruned_model",
        "set_modelopt_spec_if_exists_in_ckpt",
        "setup_trainer_and_restore_model_with_modelopt_spec",
    ),
    "nemo.collections.llm.modelopt.model_utils": ("restore_modelopt_state", "save_modelopt_state"),
    "nemo.collections.llm.modelopt.distill": (),
    "nemo.collections.llm.modelopt.distill.utils": ("get_tensor_shapes_adjust_fn_for_distillation",),
    # Slipway has its own data (data.py).
    "nemo.collections.llm.gpt.data.fine_tuning": ("FineTuningDataModule",),
}


def import_less() -> None:
    """Compile nothing, leave out packages that are not used, and import others when they are. May be called again."""
    compile_nothing()
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # an import of it raises ModuleNotFoundError
    for name, parts in SELDOM_USED.items():
        import_later(name, parts)
    for name, names in STAND_INS.items():
        stand_in(name, names)


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


def stand_in(name: str, parts: Sequence[str]) -> None:
    """Put a module in the place of one, which has nothing but a class or a function of each name."""
    if name in sys.modules:
        return
    sys.modules[name] = module = ModuleType(name)
    module.__path__ = []  # modules in it can be put in place too
    for part in parts:
        setattr(module, part, type(part, (), {}) if part[0].isupper() else _nothing)


def _nothing(*_: Any, **__: Any) -> None:
    pass


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
