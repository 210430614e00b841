"""What NeMo and Megatron import and compile when they are imported, less what no run needs.

Call `import_less` before either of them is imported.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

from slipway.training.patches import TORCH, replace, wrap

UNUSED = (
    # Quantises, prunes and distils models. A checkpoint with a state of its own is refused (checkpoint/handover.py).
    "modelopt",
    # A client for object stores, through which Megatron would open every file and count each of the many small reads of
    # a checkpoint's metadata.
    "multistorageclient",
    # Of which transformers wants one function to generate text with a second model.
    "sklearn",
    # Through which TensorBoard would write to an object store; a run writes to a folder.
    "boto3",
)


def _from(module: str, name: str) -> Callable[[], Any]:
    return lambda: getattr(importlib.import_module(module), name)


def _module(name: str) -> Callable[[], Any]:
    return lambda: importlib.import_module(name)


def _unchanged(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """The function itself, or what returns it."""
    return _unchanged if function is None else function


SYMBOLS = "torch.fx.experimental.symbolic_shapes"
MASKS = "transformers.masking_utils"


def _calling(module: str, name: str) -> Callable[..., Any]:
    """A function that imports the one of this name when it is called."""
    return lambda *arguments, **named: _from(module, name)()(*arguments, **named)


def _the_fact(name: str) -> Callable[..., Any]:
    """A function of torch's that decides what may hold a symbol: a fact is decided already."""
    return lambda claim, *more: claim if isinstance(claim, bool) else _from(SYMBOLS, name)()(claim, *more)


def _equal(one: Any, other: Any) -> Any:
    """Whether two shapes are the same."""
    known = all(isinstance(shape, tuple) and all(type(size) is int for size in shape) for shape in (one, other))
    return one == other if known else _from(SYMBOLS, "sym_eq")()(one, other)


class _AnyType:
    """Stands in an annotation."""

    def __class_getitem__(cls, _: Any) -> type:
        return cls


# Packages and modules that are always imported and seldom used, with what is always taken from each.
SELDOM_USED: dict[str, dict[str, Callable[[], Any]]] = {
    # Megatron and NeMo import wandb, which a run uses with --wandb-project, and pandas for a tokenizer.
    "wandb": {},
    "pandas": {},
    # Megatron has a reader for it, which checkpoints of Slipway do not need.
    "zarr": {"Array": lambda: _AnyType},
    # With these come torch's compiler and sympy. Lightning asks what is compiled, and torch and Transformer Engine say
    # what must not be: with no compiler, nothing is.
    MASKS: {"create_masks_for_generate": lambda: _calling(MASKS, "create_masks_for_generate")},
    SYMBOLS: {
        "expect_true": lambda: _the_fact("expect_true"),
        "statically_known_true": lambda: _the_fact("statically_known_true"),
        "sym_eq": lambda: _equal,
    },
    "torch._dynamo": {
        "OptimizedModule": lambda: _AnyType,
        "config": SimpleNamespace,
        "disable": lambda: _unchanged,
        "trace_rules": lambda: SimpleNamespace(clear_lru_cache=_nothing),  # at the start of torch.distributed
    },
    # Starts other machines, and describes a run's configuration when a checkpoint is saved. NeMo's functions are marked
    # as its commands.
    "nemo_run": {
        "cli": lambda: SimpleNamespace(entrypoint=_unchanged, factory=_unchanged),
        "Config": lambda: _AnyType,
        "Partial": lambda: _AnyType,
        "factory": lambda: _unchanged,
    },
}

# The same, but modules in them are imported without the package's own code. Lightning asks what is a metric, and takes
# that from where it can be imported first: torchmetrics.metric and torchmetrics.utilities import each other. NeMo's llm
# imports every model that it has, BERT and T5 among them, and with these most of transformers, datasets and scipy.
COLLECTIONS: dict[str, dict[str, Callable[[], Any]]] = {
    "torchmetrics": {
        "__version__": lambda: importlib.metadata.version("torchmetrics"),
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

PUT_OFF = SELDOM_USED | COLLECTIONS

# Modules for what no run does, with the names that other modules import from them. Classes have no
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
    # Draws metrics, with matplotlib.
    "torchmetrics.utilities.plot": (
        "_AX_TYPE",
        "_CMAP_TYPE",
        "_PLOT_OUT_TYPE",
        "plot_confusion_matrix",
        "plot_curve",
        "plot_single_or_multi_val",
    ),
    # Reads checkpoints for TensorRT-LLM, with zarr and transformers.
    "nemo.export.trt_llm.nemo_ckpt_loader.nemo_file": ("load_distributed_model_weights",),
    # Scores texts with a model of transformers.
    "nemo.collections.common.parts.mlm_scorer": ("MLMScorer",),
    # Writes models for ONNX.
    "transformer_engine.pytorch.onnx_extensions": (
        "onnx_attention_mask_func",
        "onnx_dequantize_fp8_op",
        "onnx_dequantize_mxfp8_op",
        "onnx_gemm",
        "onnx_layernorm",
        "onnx_quantize_fp8_op",
        "onnx_quantize_mxfp8_op",
        "te_translation_table",
        "torch_onnx_gemm_inf_op",
    ),
}


# The same for what only a checkpoint with a tokenizer has a use for.
OF_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "nemo.lightning.io.registry": (),
    "transformers": ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig"),
}


def import_less(has_tokenizer: bool = True) -> None:
    """Compile nothing, leave out packages that are not used, and import others when they are. May be called again.

    Args:
        has_tokenizer: whether NeMo's model brings a tokenizer, which it keeps in its checkpoints.
    """
    compile_nothing()
    compile_later()
    for name in UNUSED:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # an import of it raises ModuleNotFoundError
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    for name, names in (STAND_INS | ({} if has_tokenizer else OF_TOKENIZERS)).items():
        stand_in(name, names)


def compile_nothing() -> None:
    """Keep Megatron from compiling an allocator for inference when it is imported, which takes 14 to 18 seconds.

    Megatron takes the refusal for a machine that has no compiler.
    """
    from torch.utils import cpp_extension

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("training needs no CUDA extension that is compiled when it starts")

    replace(cpp_extension, "load_inline", refuse, TORCH)


def compile_later() -> None:
    """Let torch.compile do nothing with a function before its first call: Megatron marks some that no run calls."""
    import torch

    wrap(torch, "compile", _at_the_first_call, TORCH)


def _at_the_first_call(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(model: Any = None, **options: Any) -> Any:
        if not inspect.isroutine(model):  # a module, or nothing yet
            return compile_now(model, **options)
        ready = functools.cache(lambda: compile_now(model, **options))
        return functools.wraps(model)(lambda *arguments, **named: ready()(*arguments, **named))

    return compiled


def stand_in(name: str, parts: Sequence[str]) -> None:
    """Put a module in the place of one, which has nothing but a class or a function of each name."""
    if name in sys.modules:
        return
    sys.modules[name] = module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__path__ = []  # modules in it can be put in place too
    for part in parts:
        setattr(module, part, type(part, (), {}) if part.lstrip("_")[0].isupper() else _nothing)


def _nothing(*_: Any, **__: Any) -> None:
    pass


class _Later(ModuleType):
    """A module whose own code has not run yet: it does at the first use of anything in it that is no part.

    importlib's LazyLoader runs it even for who only asks whether the package is installed.
    """

    def __getattribute__(self, name: str) -> Any:
        there = super().__getattribute__("__dict__")
        if name in there:
            return there[name]
        if name in there["__parts__"]:
            return there["__parts__"][name]()
        if name.startswith("__") and name != "__version__":
            return super().__getattribute__(name)
        run_now(self)
        return getattr(self, name)


def run_now(module: ModuleType) -> None:
    """Run a module's own code, if that was put off."""
    if isinstance(module, _Later):
        module.__class__ = ModuleType  # type: ignore[assignment]
        assert module.__spec__ is not None and module.__spec__.loader is not None
        try:
            module.__spec__.loader.exec_module(module)
        except BaseException:
            sys.modules.pop(module.__name__, None)  # as Python does; the next import says the same again
            raise


class _Finder(MetaPathFinder):
    """Puts off the code of modules that are seldom used.

    A package's own code runs before any module in it is imported, as Python does it with every package.
    """

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        for package in SELDOM_USED:
            if name.startswith(f"{package}.") and isinstance(waiting := sys.modules.get(package), _Later):
                run_now(waiting)
                if name in sys.modules:  # the package has imported it itself
                    return ModuleSpec(name, _Imported(sys.modules[name]))
        if (parts := PUT_OFF.get(name)) is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if found and found.loader:
            found.loader = _PutOff(found.loader, parts)
        return found


class _PutOff(Loader):
    """Makes a module, and leaves its code to its first use."""

    def __init__(self, loader: Loader, parts: Mapping[str, Callable[[], Any]]):
        self.loader, self.parts = loader, parts

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        module.__dict__["__parts__"] = self.parts
        module.__class__ = _Later


class _Imported(Loader):
    """Gives Python a module that is there already."""

    def __init__(self, module: ModuleType):
        self.module, self.spec = module, module.__spec__

    def create_module(self, _: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec
