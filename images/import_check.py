"""Runs while the image is built: imports every distribution, and checks that compiled extensions are complete.

Usage: import_check.py VARIANT. Each module is imported in its own process: one cannot hide the error of another.

An extension that was silently left out is missed by its name. The symbols that an extension imports show that it fits
the installed torch, also those that are looked up only when a kernel runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

# Modules that commands need and that importing a distribution's top level does not import.
MODULES = (
    "megatron.core.datasets.helpers_cpp",
    "nemo.collections.llm",
    "torch.distributed.checkpoint",
    "torch.utils.tensorboard",
)
WITH_TRANSFORMER_ENGINE = ("transformer_engine.pytorch",)
# Variant → (pattern below site-packages, a symbol that it exports).
TRANSFORMER_ENGINE = (
    ("transformer_engine/**/libtransformer_engine.so", "nvte_cublas_gemm"),
    ("transformer_engine/**/transformer_engine_torch*.so", "PyInit_transformer_engine_torch"),
)
# What Apex installs with APEX_CPP_EXT and APEX_CUDA_EXT, each next to the packages.
APEX = (
    "amp_C",
    "apex_C",
    "fused_dense_cuda",
    "fused_layer_norm_cuda",
    "fused_rotary_positional_embedding",
    "fused_weight_gradient_mlp_cuda",
    "generic_scaled_masked_softmax_cuda",
    "mlp_cuda",
    "scaled_masked_softmax_cuda",
    "scaled_softmax_cuda",
    "scaled_upper_triang_masked_softmax_cuda",
    "syncbn",
)
SYMBOLS = {
    "cpu": (),
    "index": TRANSFORMER_ENGINE,
    "full": (*TRANSFORMER_ENGINE, *((f"{name}.*.so", f"PyInit_{name}") for name in APEX)),
}
# Distributions offer these names, but they cannot be imported: slim.py removed `tests`, and transformer_engine_torch
# loads only through transformer_engine.pytorch.
NO_MODULES = {"tests", "transformer_engine_torch"}


def modules(variant: str) -> list[str]:
    """The names that the installed distributions offer for import, and what the variant's commands need below them."""
    offered = {name for name in metadata.packages_distributions() if name.isidentifier() and name[0] != "_"}
    below = MODULES if variant == "cpu" else MODULES + WITH_TRANSFORMER_ENGINE
    return [*sorted(offered - NO_MODULES), *below]


def statement(name: str) -> str:
    """What imports a module. Apex's extensions are linked to torch's libraries, which are found once torch is there."""
    return f"import torch, {name}" if name in APEX else f"import {name}"


def import_errors(names: Iterable[str]) -> list[str]:
    """A line for each module that cannot be imported, with the last line of its error."""

    def attempt(name: str) -> str | None:
        words = [sys.executable, "-W", "ignore", "-c", statement(name)]
        done = subprocess.run(words, capture_output=True, text=True)
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"cannot import {name} ({reason})" if done.returncode else None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [line for line in pool.map(attempt, names) if line]


def missing_symbols(site: Path, variant: str) -> list[str]:
    """A line for each extension of the variant that is missing, or misses its symbol."""
    return [
        f"no file {pattern} exports {symbol}: the extension was not compiled"
        for pattern, symbol in SYMBOLS[variant]
        if symbol not in _symbols("--defined-only", site.glob(pattern))
    ]


def unfit_symbols(site: Path, variant: str) -> list[str]:
    """A line for each symbol that the variant's extensions import and that neither torch nor they themselves export."""
    files = [file for pattern, _ in SYMBOLS[variant] for file in site.glob(pattern)]
    if not files:
        return []
    exported = _symbols("--defined-only", [*files, *site.glob("torch/lib/*.so")])
    asked = {name for name in _symbols("--undefined-only", files) if _is_torchs(name) or name.startswith("nvte_")}
    return [f"an extension needs {name}, which this torch does not export" for name in sorted(asked - exported)]


def _is_torchs(symbol: str) -> bool:
    """Is it a C++ name in torch's namespaces?"""
    return symbol.startswith(("_ZN3c10", "_ZNK3c10", "_ZN2at", "_ZNK2at", "_ZN5torch", "_ZNK5torch"))


def _symbols(which: str, files: Iterable[Path]) -> set[str]:
    """The dynamic symbols of libraries, without their versions."""
    words = ["nm", "--dynamic", which, "--format=just-symbols", *map(str, files)]
    if not words[4:]:  # without a file, nm would read a.out
        return set()
    return {line.partition("@")[0] for line in subprocess.run(words, capture_output=True, text=True).stdout.split()}


def missing_distributions() -> list[str]:
    """A line for each requirement of a distribution that is not installed."""
    from packaging.requirements import Requirement

    installed = {d.name.lower().replace("_", "-").replace(".", "-"): d for d in metadata.distributions()}
    missing = []
    for distribution in installed.values():
        for line in distribution.requires or []:
            need = Requirement(line)
            name = need.name.lower().replace("_", "-").replace(".", "-")
            if (need.marker is None or need.marker.evaluate({"extra": ""})) and name not in installed:
                missing.append(f"{distribution.name} needs {need.name}")
    return missing


if __name__ == "__main__":
    folder, built = Path(sysconfig.get_path("purelib")), sys.argv[1]
    for line in missing_distributions():
        print(f"import check: {line}")
    names = modules(built)
    wrong = [*import_errors(names), *missing_symbols(folder, built), *unfit_symbols(folder, built)]
    if wrong:
        sys.exit("\n".join(f"import check: {line}" for line in wrong))
    print(f"import check: {len(names)} modules, {len(SYMBOLS[built])} compiled libraries")
