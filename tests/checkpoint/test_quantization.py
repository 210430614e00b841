"""The decoders against their definitions in float64, every code and every scale."""

from __future__ import annotations

import torch
from slipway.checkpoint import quantization
from slipway.checkpoint.quantization import E2M1
from slipway.tensors.bits import from_torch, to_float32, to_torch
from slipway.tensors.refs import TORCH_NAMES

SPELLINGS = {getattr(torch, name): dtype for dtype, name in TORCH_NAMES.items()}


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return to_torch(quantization.decode_mxfp4(blocks.numpy(), scales.numpy()), "BF16")


def decode_fp8_block(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first_row: int = 0):
    values = to_float32(from_torch(scale), SPELLINGS[scale.dtype])
    return to_torch(quantization.decode_fp8_block(from_torch(weight), values, block, first_row), "BF16")


def same_bits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal bit for bit, every NaN being 0x7FFF."""
    expected = torch.where(wanted.isnan(), 0x7FFF, wanted.view(torch.int16))
    return torch.equal(found.view(torch.int16), expected.to(torch.int16))


def test_mxfp4_every_byte_times_every_scale():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of nibbles, in 16 groups
    for low in range(256):
        scales = torch.full((16,), low, dtype=torch.uint8)
        found = decode_mxfp4(blocks.unsqueeze(0), scales.unsqueeze(0)).view(-1)
        nibbles = torch.stack([blocks & 15, blocks >> 4], -1).flatten().long()
        scale = float("nan") if low == 255 else 2.0 ** (low - 127)
        wanted = (torch.tensor(E2M1, dtype=torch.float64)[nibbles] * scale).float().bfloat16()
        assert same_bits(found, wanted), low


def test_mxfp4_low_nibble_comes_first():
    blocks = torch.zeros(1, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0] = 0x72  # low nibble 2 = 1.0, high nibble 7 = 6.0
    found = decode_mxfp4(blocks, torch.full((1, 1), 127, dtype=torch.uint8))
    assert found[0, :3].tolist() == [1.0, 6.0, 0.0]


def definition_fp8(code: int) -> float:
    """float8_e4m3fn by its definition: 1 sign, 4 exponent (bias 7), 3 mantissa; S.1111.111 is NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def test_fp8_every_code_times_scales_of_every_size():
    codes = torch.arange(256, dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn).view(16, 16)
    values = torch.tensor([definition_fp8(code) for code in range(256)], dtype=torch.float64).view(16, 16)
    generator = torch.Generator().manual_seed(0)
    scales = torch.rand(200, generator=generator).tolist() + [2.0**e for e in range(-149, 128)]
    scales += [-0.1, 0.0, -0.0, 3e38, float("inf"), float("nan")]
    for scale in scales:
        scale32 = torch.tensor([[scale]], dtype=torch.float32)
        # The product, exact in float64, rounded to float32, then to bfloat16.
        wanted = (values * scale32.double()).float().bfloat16()
        assert same_bits(decode_fp8_block(weight, scale32, (128, 128)), wanted), scale


def test_fp8_ragged_blocks_and_rows_from_the_middle():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 127, (300, 200), dtype=torch.uint8, generator=generator)
    weight = codes.view(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator)
    whole = torch.empty(300, 200, dtype=torch.bfloat16)
    for row in range(300):
        for block in range(2):
            columns = slice(128 * block, 128 * block + 128)
            whole[row, columns] = (weight[row, columns].float() * scale[row // 128, block]).bfloat16()
    assert same_bits(decode_fp8_block(weight, scale, (128, 128)), whole)
    assert same_bits(decode_fp8_block(weight[100:260], scale, (128, 128), first_row=100), whole[100:260])


def test_fp8_scales_in_e8m0():
    weight = torch.ones(4, 4).to(torch.float8_e4m3fn)
    scale = torch.tensor([[130]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert decode_fp8_block(weight, scale, (128, 128)).eq(8).all()


def e8m0(byte: int) -> float:
    return float("nan") if byte == 255 else 2.0 ** (byte - 127)


def test_mxfp8_every_code_times_every_scale():
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32)
    values = torch.tensor([definition_fp8(code) for code in range(256)], dtype=torch.float64).view(8, 32)
    for byte in range(256):
        scales = torch.full((8, 1), byte, dtype=torch.uint8)
        found = to_torch(quantization.decode_mxfp8(codes.numpy(), scales.numpy()), "BF16")
        assert same_bits(found, (values * e8m0(byte)).float().bfloat16()), byte


def test_mxfp8_scales_belong_to_32_elements_of_their_row():
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 127, (300, 160), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (300, 5), dtype=torch.uint8, generator=generator)
    wanted = codes.view(torch.float8_e4m3fn).float() * (2.0 ** (scales.float() - 127)).repeat_interleave(32, 1)
    found = quantization.decode_mxfp8(codes.numpy(), scales.numpy())
    assert same_bits(to_torch(found, "BF16"), wanted.bfloat16())
    # The same by the decoder of blocks, which takes rows of any length.
    values = torch.tensor([e8m0(int(byte)) for byte in scales.flatten()]).view(300, 5)
    rows = decode_fp8_block(codes[7:, :150].contiguous().view(torch.float8_e4m3fn), values, (1, 32), first_row=7)
    assert same_bits(rows, wanted[7:, :150].bfloat16())


def test_nvfp4_every_byte_times_every_scale():
    """The scales of 16 elements and of the tensor become one float32, then the product another."""
    packed = torch.arange(256, dtype=torch.uint8).view(32, 8)
    elements = torch.tensor(E2M1, dtype=torch.float64)[torch.stack([packed & 15, packed >> 4], -1).flatten(1).long()]
    of_tensor = [*torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist(), 2688.0, 1e-30, 1e30, 1e-45, 3e38]
    for number in [*of_tensor, 0.0, -0.7, float("inf"), float("nan")]:
        one = torch.tensor([number], dtype=torch.float32)
        for divide in (False, True):
            values = quantization.nvfp4_scales(one.numpy(), divide=divide)
            for code in range(0, 256, 1 if number in of_tensor[:2] else 17):
                scale = torch.tensor(definition_fp8(code), dtype=torch.float64)
                both = (scale / one.double() if divide else scale * one.double()).float()
                found = quantization.decode_nvfp4(packed.numpy(), torch.full((32, 1), code).byte().numpy(), values)
                wanted = (elements * both.double()).float().bfloat16()
                assert same_bits(to_torch(found, "BF16"), wanted), (number, divide, code)


def test_nothing_to_decode():
    nothing = torch.empty(0, 8, dtype=torch.uint8).numpy()
    assert quantization.decode_nvfp4(nothing, nothing[:, :1], quantization.e4m3()).shape == (0, 16)
    assert quantization.decode_mxfp8(nothing.repeat(4, 1), nothing[:, :1]).shape == (0, 32)
    assert decode_mxfp4(torch.empty(2, 0, 16, dtype=torch.uint8), torch.empty(2, 0, dtype=torch.uint8)).shape == (2, 0)
    for shape in ((0, 5), (5, 0)):
        weight = torch.empty(shape).to(torch.float8_e4m3fn)
        assert decode_fp8_block(weight, torch.ones(1, 1), (128, 128)).shape == shape
