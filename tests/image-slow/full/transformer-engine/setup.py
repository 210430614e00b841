"""A small source that is built like Transformer Engine: a library by CMake, and a binding to torch."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).parent


class BuildCore(build_py):
    """Build the library next to the package's modules."""

    def run(self):
        super().run()
        print("Building CMake extension transformer_engine", flush=True)
        common, build = HERE / "transformer_engine" / "common", HERE / "build" / "cmake"
        architectures = f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['NVTE_CUDA_ARCHS']}"
        words = [
            "cmake",
            "-S",
            common,
            "-B",
            build,
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            architectures,
        ]
        subprocess.run([*words, "-DCMAKE_BUILD_TYPE=Release"], check=True)
        subprocess.run(["cmake", "--build", build, f"--parallel={os.environ['MAX_JOBS']}"], check=True)
        self.copy_file(build / "libtransformer_engine.so", Path(self.build_lib) / "transformer_engine")


setup(
    name="transformer_engine",
    version="2.9.0",
    packages=["transformer_engine"],
    ext_modules=[CppExtension("transformer_engine_torch", ["binding.cpp"])],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildCore},
)
