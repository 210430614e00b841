#!/usr/bin/env bash
# Slipway's own kernels are compiled when they are first used: the counting by NVRTC, as torch does it, and the unpacking
# of NF4 by Triton. Both to machine code for Hopper and Blackwell.
set -euo pipefail

cat >"$WORK/compile.py" <<'PYTHON'
import ctypes

import torch
from slipway.training import counting, nf4_gpu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

kernel = nf4_gpu._unpack_kernel
pointers = {"codes": "*u8", "scales": "*fp32", "table": "*fp32", "found": "*bf16", "count": "i32"}
sizes = {"BYTES": nf4_gpu.BYTES, "BYTES_OF_A_SCALE": 32}
for capability in (90, 100):
    source = ASTSource(kernel, {**pointers, **dict.fromkeys(sizes, "constexpr")}, sizes)
    found = compile(source, target=GPUTarget("cuda", capability, 32))
    assert found.asm["cubin"].startswith(b"\x7fELF") and f"sm_{capability}" in found.asm["ptx"]

nvrtc = ctypes.CDLL(f"libnvrtc.so.{torch.version.cuda.split('.')[0]}")
for capability in (90, 100):
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), counting.SOURCE.encode(), b"count.cu", 0, None, None) == 0
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture=sm_{capability}".encode())
    failed = nvrtc.nvrtcCompileProgram(program, 1, options)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    assert nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)) == 0 and size.value > 0
    print(f"sm_{capability}: {size.value} bytes by NVRTC")
PYTHON
docker run --rm --network none --read-only --tmpfs /tmp --volume "$WORK:/made:ro" "$IMAGE" python -W ignore /made/compile.py
