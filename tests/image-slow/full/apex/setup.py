"""A small source that is built like Apex: by torch's CUDAExtension, if APEX_CPP_EXT and APEX_CUDA_EXT are set."""

import os

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# Apex's other extensions, empty.
EMPTY = (
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


def empty(name):
    return CppExtension(name, ["csrc/empty.c"], define_macros=[("NAME", name)], extra_link_args=["-Wl,--no-as-needed"])


extensions = [empty("apex_C")] if os.environ.get("APEX_CPP_EXT") else []
if os.environ.get("APEX_CUDA_EXT"):
    # With -lineinfo the times of sources and of the headers of CUDA and torch get into the device code.
    options = {"cxx": [], "nvcc": ["-lineinfo"]}
    amp = CUDAExtension("amp_C", ["csrc/amp_C.cpp", "csrc/scale.cu"], extra_compile_args=options)
    extensions += [amp, *map(empty, EMPTY)]
setup(
    name="apex",
    version="0.1",
    packages=["apex"],
    ext_modules=extensions,
    cmdclass={"build_ext": BuildExtension},
)
