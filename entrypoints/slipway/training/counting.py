"""How often each value occurs among the logits of a token.

A kernel in CUDA C, because it counts in the memory that the threads of a block share: in Triton, which has none, every
logit is an atomic addition to the GPU's memory, and a row takes ten times as long.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slipway.training.patches import TORCH, wrap

# 32 exponents of 128 fractions each, for both signs: positive values first, the largest first, then negative ones. All
# bfloat16 numbers would be 65536, and the counts of a row would not fit into the registers of one program.
VALUES = 8192
SMALLEST = 109 << 7  # the bits of 2^-18: 109 - 127 = -18. The largest value with a place of its own is nearly 2^14.
INFINITE = 0x7F80  # the bits of infinity; those of NaN are larger
THREADS = 512  # of a block, which counts one row

SOURCE = f"""
#define VALUES {VALUES}
#define SMALLEST {SMALLEST}

// The place of a bfloat16 among the values in descending order. The bits of a positive float grow with its value.
__device__ int place_of(int bits) {{
    int size = min(max((bits & 0x7FFF) - SMALLEST, 0), VALUES / 2 - 1);
    return bits > 0x8000 ? VALUES / 2 + size : VALUES / 2 - 1 - size;  // -0 (0x8000) is equal to 0
}}

// An integer that is larger for a larger bfloat16, and the same for 0 and -0.
__device__ int order_of(int bits) {{ return bits & 0x8000 ? -(bits & 0x7FFF) : bits; }}

extern "C" __global__ void count(const unsigned short* logits, const long long* labels, int* counts, int* places,
                                 int* ranks, int* largest, int* is_first, int vocabulary) {{
    __shared__ int seen[VALUES];
    __shared__ int all_equal, all_size, is_beaten;
    for (int i = threadIdx.x; i < VALUES; i += blockDim.x) seen[i] = 0;
    if (threadIdx.x == 0) all_equal = all_size = is_beaten = 0;
    __syncthreads();
    const unsigned short* row = logits + (long long)blockIdx.x * vocabulary;
    int label = (int)labels[blockIdx.x];
    int wanted = place_of(row[label]), order = order_of(row[label]);
    int equal = 0, size = 0, beaten = 0;
    auto see = [&](int bits, int at) {{
        int place = place_of(bits), other = order_of(bits);
        atomicAdd(&seen[place], 1);
        equal += place == wanted && at <= label;
        size = max(size, bits & 0x7FFF);
        beaten |= other > order || (other == order && at < label);
    }};
    if (vocabulary % 8 == 0) {{  // rows begin at a multiple of 16 bytes
        const uint4* eight = (const uint4*)row;
        for (int i = threadIdx.x; i < vocabulary / 8; i += blockDim.x) {{
            uint4 found = eight[i];
            unsigned int pairs[4] = {{found.x, found.y, found.z, found.w}};
            for (int k = 0; k < 4; k++) {{
                see(pairs[k] & 0xFFFF, 8 * i + 2 * k);
                see(pairs[k] >> 16, 8 * i + 2 * k + 1);
            }}
        }}
    }} else {{
        for (int i = threadIdx.x; i < vocabulary; i += blockDim.x) see(row[i], i);
    }}
    if (equal) atomicAdd(&all_equal, equal);
    atomicMax(&all_size, size);
    if (beaten) is_beaten = 1;
    __syncthreads();
    for (int i = threadIdx.x; i < VALUES; i += blockDim.x) counts[(long long)blockIdx.x * VALUES + i] = seen[i];
    if (threadIdx.x == 0) {{
        places[blockIdx.x] = wanted;
        ranks[blockIdx.x] = all_equal;
        largest[blockIdx.x] = all_size;
        is_first[blockIdx.x] = !is_beaten;
    }}
}}
"""


@dataclass(frozen=True)
class Counts:
    """What is known of each token's logits.

    Args:
        counts: int32 [tokens, VALUES], how often each value occurs; the largest value first.
        places: int32 [tokens], the place of the label's logit among the values.
        ranks: int32 [tokens], the label's number among the logits with this value, from 1, in the vocabulary's order.
        largest: int32 [tokens], the bits of the logit that is largest in size.
        is_first: bool [tokens], the label's logit is the first of the largest ones.
    """

    counts: Tensor
    places: Tensor
    ranks: Tensor
    largest: Tensor
    is_first: Tensor


def count(logits: Tensor, labels: Tensor) -> Counts:
    """Count the logits of each token.

    Args:
        logits: [tokens, V] bfloat16.
        labels: [tokens] int64.
    """
    bits = logits.contiguous().view(torch.int16)
    if not logits.is_cuda:
        return _count(bits.int() & 0xFFFF, labels)
    tokens, vocabulary = logits.shape
    counts = torch.empty(tokens, VALUES, dtype=torch.int32, device=logits.device)
    places, ranks, largest, is_first = torch.empty(4, tokens, dtype=torch.int32, device=logits.device).unbind()
    if tokens:
        arguments = [bits, labels.contiguous(), counts, places, ranks, largest, is_first, vocabulary]
        _kernel(logits.device)(grid=(tokens, 1, 1), block=(THREADS, 1, 1), args=arguments)
    return Counts(counts, places, ranks, largest, is_first.bool())


@functools.cache
def _kernel(device: torch.device) -> Any:
    from torch.utils import cpp_extension

    # torch names the folder of CUDA's headers to the compiler, and fails where there is no CUDA_HOME, as in the images.
    # This kernel needs no header.
    wrap(cpp_extension, "CUDA_HOME", lambda home: home or os.sep, TORCH)
    with torch.cuda.device(device):
        return torch.cuda._compile_kernel(SOURCE, "count")


def _count(bits: Tensor, labels: Tensor) -> Counts:
    """The same as the kernel, for tests on the CPU and on the GPU. `bits`: int32 [tokens, V], those of bfloat16."""
    size = ((bits & 0x7FFF) - SMALLEST).clamp(0, VALUES // 2 - 1)
    places = torch.where(bits > 0x8000, VALUES // 2 + size, VALUES // 2 - 1 - size)
    order = torch.where(bits >= 0x8000, -(bits & 0x7FFF), bits)
    counts = torch.zeros(len(bits), VALUES, dtype=torch.int32, device=bits.device)
    counts.scatter_add_(1, places.long(), torch.ones_like(places))
    of_label = labels[:, None]
    wanted, best = places.gather(1, of_label), order.gather(1, of_label)
    at = torch.arange(bits.shape[1], device=bits.device)
    ranks = ((places == wanted) & (at <= of_label)).sum(1, dtype=torch.int32)
    beaten = (order > best) | ((order == best) & (at < of_label))
    return Counts(counts, wanted[:, 0], ranks, (bits & 0x7FFF).max(1).values, ~beaten.any(1))
