"""Run while the image is built: imports what commands need, and proves that compiled extensions are there.

Usage: import_check.py VARIANT. Each module is imported in a process of its own. Where no GPU is, a CUDA extension
cannot be loaded: that it was compiled and linked is seen from the symbols that it exports.
"""

import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

MODULES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "safetensors",
    "megatron.core.datasets.helpers_cpp",
    "megatron.core",
    "nemo.collections.llm",
    "nvidia_resiliency_ext",
    "tensorboard",
    "tensorstore",
    "wandb",
    "matplotlib",
)
# Variant → (pattern below site-packages, a symbol that it exports).
TRANSFORMER_ENGINE = (
    ("transformer_engine/**/libtransformer_engine.so", "nvte_cublas_gemm"),
    ("transformer_engine/**/transformer_engine_torch*.so", "PyInit_transformer_engine_torch"),
)
SYMBOLS = {
    "cpu": (),
    "index": TRANSFORMER_ENGINE,
    "full": (*TRANSFORMER_ENGINE, ("amp_C*.so", "PyInit_amp_C")),
}


def missing_symbols(site: Path, variant: str) -> list[str]:
    """What is not there of the variant's extensions."""
    missing = []
    for pattern, symbol in SYMBOLS[variant]:
        files = list(site.glob(pattern))
        words = ["nm", "--dynamic", "--defined-only", "--format=just-symbols", *files]
        exported = subprocess.run(words, capture_output=True, text=True).stdout if files else ""
        if symbol not in exported.split():
            missing.append(f"{pattern} with {symbol}")
    return missing


def missing_distributions() -> list[str]:
    """Distributions whose requirements are not installed."""
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
    wrong = [
        f"cannot import {module}"
        for module in MODULES
        if subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"]).returncode
    ]
    wrong += missing_symbols(Path(sysconfig.get_path("purelib")), sys.argv[1])
    for line in missing_distributions():
        print(f"import check: {line}")
    if wrong:
        sys.exit(f"import check: {'; '.join(wrong)}")
