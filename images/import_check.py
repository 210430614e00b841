"""Run while the image is built: imports what every command needs, each in a process of its own."""

import subprocess
import sys

MODULES = (
    "torch",
    "transformers",
    "safetensors",
    "megatron.core.datasets.helpers_cpp",
    "megatron.core",
    "nemo.collections.llm",
    "tensorboard",
    "matplotlib",
)

failed = [
    module
    for module in MODULES
    if subprocess.run([sys.executable, "-W", "ignore", "-c", f"import {module}"]).returncode
]
if failed:
    sys.exit(f"cannot be imported: {', '.join(failed)}")
