"""GPU decoders against the device's own copy, on the shapes of DeepSeek-V3 and gpt-oss-120b; bits against the CPU's.

Run on a machine with a GPU: `python benchmarks/gpu_decode.py [--sweep]`. A rate counts bytes read and bytes written;
every measurement works on fresh random data and is the median of many, each larger than the cache.
"""

from __future__ import annotations

import argparse
import functools
import itertools

import torch
import triton
from slipway.checkpoint import gpu, quantization
from slipway.tensors.bits import from_torch, to_torch

FP8_SHAPES = {  # one matrix of DeepSeek-V3 and the same stacked to more than the cache holds
    "q_b_proj": (24576, 1536),
    "o_proj": (7168, 16384),
    "dense gate_proj": (18432, 7168),
    "expert gate_proj x64": (64 * 2048, 7168),
    "expert down_proj x64": (64 * 7168, 2048),
}
MXFP4_SHAPES = {  # experts, rows, groups of 32
    "gate_up_proj x32": (32, 5760, 90),
    "down_proj x32": (32, 2880, 90),
    "gate_up_proj x128": (128, 5760, 90),
}


def rate(function, moved: int, *, graph: bool = False) -> float:
    """GB/s by the median of many runs timed with device events; each calls often enough to hide the launches.

    Args:
        graph: launch these calls as one. Starting Triton's kernel from Python takes as long as the smallest of these
            tensors do, and a copy's start does not; a copy within a graph goes by another, slower engine.
    """
    calls = max(1, round(4e9 / moved))

    def repeated() -> None:
        for _ in range(calls):
            function()

    if graph:
        repeated()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            repeated()
        repeated = captured.replay
    return calls * moved / triton.testing.do_bench(repeated, warmup=50, rep=300, return_mode="median") / 1e6


def copy_rate(bytes_moved: int) -> float:
    """GB/s of a device-to-device copy that reads and writes `bytes_moved` together."""
    source = torch.randint(0, 256, (bytes_moved // 2,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return rate(lambda: target.copy_(source), bytes_moved)


def fp8(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128), device="cuda") * 1e-3
    return codes, scales


def mxfp4(shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, device="cuda")
    return blocks, torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.equal(found.cpu().view(torch.int16), wanted.view(torch.int16))


def check() -> None:
    """Every code with scales of every kind, ragged edges, NaN and infinity included, bit for bit."""
    torch.manual_seed(1)
    decode = quantization.decode_fp8_block
    for rows, columns, block in ((300, 515, (128, 128)), (64, 256, (32, 64)), (1, 7, (128, 128)), (7, 300, (3, 100))):
        codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8).view(torch.float8_e4m3fn)
        shape = (-(-rows // block[0]), -(-columns // block[1]))
        for scale in (torch.rand(shape), torch.randn(shape) * 1e36, torch.rand(shape) * 1e-40):
            for first in (0, 1):
                part = codes[first:]
                wanted = to_torch(decode(from_torch(part), scale.numpy(), block, first), "BF16")
                found = gpu.decode_fp8_block(part.cuda(), scale.cuda(), block, first)
                assert same_bits(found, wanted), (rows, columns)
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 1, 16).repeat(1, 256, 1)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256).repeat(16, 1)
    wanted = to_torch(quantization.decode_mxfp4(blocks.numpy(), scales.numpy()), "BF16")
    assert same_bits(gpu.decode_mxfp4(blocks.cuda(), scales.cuda()), wanted)
    print("bits: every code, scale, ragged edge and NaN as on the CPU")


def sweep() -> None:
    """All tile sizes, to choose the defaults in gpu.py from."""
    results = []
    codes, scales = fp8((64 * 2048, 7168))
    moved = 3 * codes.numel() + scales.nbytes
    for groups, warps in itertools.product((64, 128, 256, 512, 1024), (2, 4, 8)):
        call = functools.partial(gpu.decode_fp8_block, codes, scales, (128, 128), groups=groups, warps=warps)
        results.append((rate(call, moved), f"fp8 groups {groups} warps {warps}"))
    blocks, scales = mxfp4((128, 5760, 90))
    moved = 5 * blocks.nbytes + scales.nbytes
    for words, warps in itertools.product((64, 128, 256, 512, 1024), (1, 2, 4, 8)):
        call = functools.partial(gpu.decode_mxfp4, blocks, scales, words=words, warps=warps)
        results.append((rate(call, moved), f"mxfp4 words {words} warps {warps}"))
    for each, name in sorted(results, reverse=True):
        print(f"{each:.0f} GB/s {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try every tile size first")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    check()
    if parser.parse_args().sweep:
        sweep()
    ours = functools.partial(rate, graph=True)
    print(f"{'tensor':34}{'moved':>9}{'ours':>12}{'copy':>12}{'ratio':>7}")
    for name, shape in FP8_SHAPES.items():
        codes, scales = fp8(shape)
        moved = 3 * codes.numel() + scales.nbytes
        show(f"fp8 {name}", moved, ours(lambda c=codes, s=scales: gpu.decode_fp8_block(c, s, (128, 128)), moved))
    for name, shape in MXFP4_SHAPES.items():
        blocks, scales = mxfp4(shape)
        moved = 5 * blocks.nbytes + scales.nbytes
        show(f"mxfp4 {name}", moved, ours(lambda b=blocks, s=scales: gpu.decode_mxfp4(b, s), moved))


def show(name: str, moved: int, ours: float) -> None:
    copy = copy_rate(moved)
    print(f"{name:34}{moved / 1e6:6.0f} MB{ours:7.0f} GB/s{copy:7.0f} GB/s{ours / copy:7.2f}")


if __name__ == "__main__":
    main()
