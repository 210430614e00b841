"""The demo's checks: what the folder that it leaves must prove."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import Tensor

# Beyond the tiny models' sliding windows, and beyond the length from which their rope is scaled.
FORWARD_LENGTH = 128
# Of the logits' standard deviation. Both run the same float32 arithmetic on the same weights in another order: some
# units in the last place (2^-23 of a value) over two or three layers. A wrong transpose or a shifted window is off by
# 0.01 and more.
FORWARD_BOUND = 2e-5
FORWARD_BOUND_ON_GPU = 8e-3  # Transformer Engine multiplies float32 as TF32, which has 10 bits of mantissa


@dataclass
class Check:
    what: str
    passed: bool
    found: str


def checks(folder: Path, steps: int) -> list[Check]:
    """What the demo's folder proves after so many steps of training."""
    return [
        _dequantised_is_exact(folder),
        *_forward_is_the_same(folder),
        *_training_went_well(folder, steps),
        _merged_is_complete(folder),
    ]


def _tensors(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def by_definition(stored: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a model's BF16 form from those of its quantised form, by the formats' definitions in float64.

    Args:
        config: config.json of the quantised form.
    """
    tensors = {}
    for name, tensor in stored.items():
        base = name.removesuffix("_blocks").removesuffix("_packed")
        if name.endswith("_blocks"):
            tensors[base] = _mxfp4(tensor, stored[f"{base}_scales"]).transpose(-1, -2)
        elif f"{base}_global_scale" in stored or f"{base}_scale_2" in stored:
            tensors[base] = _nvfp4(tensor, base, stored)
        elif name.endswith("_packed"):
            tensors[base] = _mxfp4(tensor.unflatten(-1, (-1, 16)), stored[f"{base}_scale"])
        elif scale := next((s for s in ("_scale_inv", "_scale") if f"{name}{s}" in stored), ""):
            scales = stored[f"{name}{scale}"]
            tensors[name] = _fp8(tensor, scales, _block(tensor, scales, config["quantization_config"]))
        elif not name.endswith(("_scales", "_scale_inv", "_scale", "_scale_2")):
            tensors[name] = tensor
    return tensors


def _block(weight: Tensor, scales: Tensor, about: Mapping[str, Any]) -> Sequence[int]:
    """Rows and columns that share an FP8 scale, as quantization_config has it."""
    groups = about.get("config_groups", {})
    weights = groups["group_0"]["weights"] if groups else {}
    if block := about.get("weight_block_size") or weights.get("block_structure"):
        return block
    if size := weights.get("group_size"):
        return (1, size)
    return tuple(weight.shape) if scales.numel() == 1 else (1, weight.shape[1])


def _e2m1(packed: Tensor) -> Tensor:
    """float64 [..., 2·n] from bytes [..., n], the low nibble first."""
    import torch

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nibbles = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).long()
    return torch.cat([values, -values])[nibbles]


def _e8m0(scales: Tensor) -> Tensor:
    """float64 of exponents with the bias 127; 255 is NaN."""
    import torch

    codes = scales.view(torch.uint8)
    return (2.0 ** (codes.double() - 127)).masked_fill(codes == 255, float("nan"))


def _nvfp4(packed: Tensor, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """BF16 [rows, columns]: e2m1 times the float32 that the scales of 16 elements and of the tensor make together.

    Both steps round to float32, as in ModelOpt (NVFP4QTensor.dequantize), compressed-tensors and vLLM.
    """
    scales = _e4m3(stored[f"{name}_scale"])
    if f"{name}_global_scale" in stored:
        scales = scales / stored[f"{name}_global_scale"].double()
    else:
        scales = scales * stored[f"{name}_scale_2"].double()
    scales = scales.float().double().repeat_interleave(16, dim=-1)
    return (_e2m1(packed) * scales).float().bfloat16()


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 [..., 32·groups] from e2m1 blocks [..., groups, 16] and scales [..., groups]."""
    return (_e2m1(blocks) * _e8m0(scales).unsqueeze(-1)).flatten(-2).bfloat16()


def _e4m3(codes: Tensor) -> Tensor:
    """float64 of float8_e4m3fn."""
    import torch

    code = codes.view(torch.uint8).long()
    sign, exponent, fraction = 1.0 - 2.0 * (code >> 7), (code >> 3) & 15, (code & 7).double() / 8
    values = sign * torch.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent.double() - 7))
    return values.masked_fill((code & 127) == 127, float("nan"))


def _fp8(weight: Tensor, scales: Tensor, block: Sequence[int]) -> Tensor:
    """BF16 [rows, columns]: each element of e4m3 times its block's scale, rounded to float32, then to BF16."""
    import torch

    rows, columns = weight.shape
    scales = _e8m0(scales) if scales.dtype == torch.uint8 else scales.double()
    scales = scales.reshape(-1, -(-columns // block[1]))
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    return (_e4m3(weight) * scales[row][:, column]).float().bfloat16()


def _dequantised_is_exact(folder: Path) -> Check:
    """Compares with the format's definition, bit for bit."""
    import torch

    config = json.loads((folder / "hf" / "config.json").read_text())
    wanted, found = by_definition(_tensors(folder / "hf"), config), _tensors(folder / "bf16")
    bits = {2: torch.int16, 4: torch.int32}
    wrong = sum(
        int((found[name].view(bits[t.itemsize]) != t.contiguous().view(bits[t.itemsize])).sum())
        for name, t in wanted.items()
    )
    size = sum(tensor.numel() for tensor in wanted.values())
    what = "dequantised values are those of the definition, bit for bit"
    return Check(what, wrong == 0 and wanted.keys() == found.keys(), f"{wrong} of {size} differ")


def _forward_is_the_same(folder: Path) -> Iterator[Check]:
    import torch
    from transformers import AutoModelForCausalLM, logging

    logging.set_verbosity_error()  # transformers has no use for a layer for multi-token prediction, and says so
    generator = torch.Generator().manual_seed(7)
    vocab_size = json.loads((folder / "hf" / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(5, vocab_size, (2, FORWARD_LENGTH), generator=generator)

    def logits(name: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            return model.eval()(tokens).logits

    reference, exported = logits("bf16"), logits("exported")
    difference = (reference - exported).abs().max().item()
    what = "transformers: logits of the exported model are the dequantised one's"
    yield Check(what, difference == 0, f"max |difference| {difference:g}, bound 0: the weights must be the same")

    from slipway.training.forward import logits_of_nemo

    difference = ((reference - logits_of_nemo(folder / "nemo", tokens)).abs().max() / reference.std()).item()
    what = "NeMo: logits of the imported checkpoint are transformers'"
    size = f"of the standard deviation {reference.std():.2f}"
    bound = FORWARD_BOUND_ON_GPU if torch.cuda.is_available() else FORWARD_BOUND
    found = f"max |difference| {difference:.1e} {size}, bound {bound:g}"
    yield Check(what, difference < bound, found)


def _training_went_well(folder: Path, steps: int) -> Iterator[Check]:
    from slipway.training.heads import DecodingHeads

    run = RunFolder(folder / "run")
    before, after, metrics = (
        json.loads((folder / "stopped.json").read_text()),
        run.read_status(),
        run.read_metrics(),
    )
    went_on = after["started_at_step"] == before["step"] and [m["step"] for m in metrics] == list(range(steps))
    yield Check(
        "the resumed run went on at the step where it stopped",
        went_on,
        f"stopped at {before['step']} of {steps}",
    )
    unchanged = not before["base_changed"] and not after["base_changed"]
    unchanged = unchanged and before["base_checksum"] == after["base_checksum"]
    yield Check("the frozen base did not change by a bit", unchanged, f"checksum {after['base_checksum'][:16]}")

    import torch

    heads = _tensors(folder / "heads")
    torch.manual_seed(1234)
    first = DecodingHeads(heads["temp_head.mlp.0.weight"].shape[1]).state_dict()
    changed = sum(int((heads[name] != first[name]).any()) for name in first)
    yield Check("the heads did change", changed == len(first) == 8, f"{changed} of {len(first)} tensors")
    start, end = (sum(m["loss"] for m in part) / 3 for part in (metrics[:3], metrics[-3:]))
    yield Check("the loss fell", end < start, f"{start:.5f} → {end:.5f}, means of three steps")


def _merged_is_complete(folder: Path) -> Check:
    merged, base, heads = _tensors(folder / "merged"), _tensors(folder / "bf16"), _tensors(folder / "heads")
    wanted = {f"llm.{name}": part for name, part in base.items()}
    wanted |= {name: part.bfloat16() for name, part in heads.items()}
    same = merged.keys() == wanted.keys() and all(bool((merged[n] == part).all()) for n, part in wanted.items())
    found = f"{len(merged) - len(heads)} llm.* and {len(heads)} of the heads"
    return Check(
        "the merged model has the base's tensors unchanged and the 8 of the heads",
        same and len(heads) == 8,
        found,
    )
