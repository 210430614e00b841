#!/usr/bin/env bash
# Triton compiles in the image, also with a read-only root: a kernel to machine code for Hopper and Blackwell, and with
# gcc the module that calls the driver. The driver itself (libcuda) is not needed for that.
set -euo pipefail

cat >"$WORK/compile.py" <<'PYTHON'
import pathlib
import subprocess
import sysconfig
import tempfile

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def double(source, target, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + place, tl.load(source + place, mask=place < count) * 2, mask=place < count)


for capability in (90, 100):
    signature = {"source": "*fp32", "target": "*fp32", "count": "i32", "BLOCK": "constexpr"}
    kernel = triton.compile(ASTSource(double, signature, {"BLOCK": 128}), target=GPUTarget("cuda", capability, 32))
    assert kernel.asm["cubin"].startswith(b"\x7fELF") and f"sm_{capability}" in kernel.asm["ptx"]

from triton.backends.nvidia import driver
from triton.runtime.build import _build

with tempfile.TemporaryDirectory() as folder:
    here = pathlib.Path(folder)
    # An empty library with the driver's name: the linker wants the file, and looks up no function in it.
    (here / "empty.c").write_text("")
    subprocess.run(["gcc", "-shared", "-o", here / "libcuda.so.1", here / "empty.c"], check=True)
    source = pathlib.Path(driver.dirname, "driver.c")
    built = _build("cuda_utils", str(source), folder, [folder], [str(d) for d in driver.include_dirs], ["libcuda.so.1"], [])
    assert pathlib.Path(built).read_bytes().startswith(b"\x7fELF") and sysconfig.get_config_var("EXT_SUFFIX") in built
print("compiled")
PYTHON
chmod 644 "$WORK/compile.py"
docker run --rm --network none --read-only --tmpfs /tmp:exec --user 4242:4343 --volume "$WORK:/work:ro" "$IMAGE" \
    python -W ignore /work/compile.py | grep compiled
