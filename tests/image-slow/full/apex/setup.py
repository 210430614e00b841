"""A small source that is built like Apex: by torch's CUDAExtension, if APEX_CUDA_EXT is set."""

import os

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

extensions = [CUDAExtension("amp_C", ["csrc/amp_C.cpp", "csrc/scale.cu"])] if os.environ.get("APEX_CUDA_EXT") else []
setup(
    name="apex",
    version="0.1",
    packages=["apex"],
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
)
