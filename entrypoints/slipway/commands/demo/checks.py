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
    about, tensors = config["quantization_config"], {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            tensors[name] = _mxfp4(tensor, stored[f"{name}_scales"])
        elif f"{name}_scale_inv" in stored:
            tensors[name] = _fp8(tensor, stored[f"{name}_scale_inv"], about["weight_block_size"])
        elif f"{name}_scale" in stored:
            groups = about.get("config_groups", {})  # fbgemm has a scale for each row and no need to say so
            weights = groups["group_0"]["weights"] if groups else {"strategy": "channel"}
            block = {"tensor": tensor.shape, "channel": (1, tensor.shape[1])}
            size = block.get(weights["strategy"]) or weights["block_structure"]
            tensors[name] = _fp8(tensor, stored[f"{name}_scale"], size)
        elif not name.endswith(("_scales", "_scale_inv", "_scale")):
            tensors[name] = tensor
    return tensors


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 [experts, 32·groups, rows] from e2m1 blocks [experts, rows, groups, 16], low nibble first, and scales."""
    import torch

    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat([values, -values])
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()
    scaled = values[nibbles] * (2.0 ** (scales.double() - 127)).unsqueeze(-1)
    return scaled.flatten(-2).transpose(-1, -2).bfloat16()


def _fp8(weight: Tensor, scales: Tensor, block: Sequence[int]) -> Tensor:
    """BF16 [rows, columns]: each element of e4m3 times its block's scale, rounded to float32, then to BF16."""
    import torch

    rows, columns = weight.shape
    code = weight.view(torch.uint8).long()
    sign, exponent, fraction = 1.0 - 2.0 * (code >> 7), (code >> 3) & 15, (code & 7).double() / 8
    values = sign * torch.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent.double() - 7))
    values[(code & 127) == 127] = float("nan")
    scales = scales.double().reshape(-1, -(-columns // block[1]))
    row, column = torch.arange(rows) // block[0], torch.arange(columns) // block[1]
    return (values * scales[row][:, column]).float().bfloat16()


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
    found = f"max |difference| {difference:.1e} {size}, bound {FORWARD_BOUND:g}"
    yield Check(what, difference < FORWARD_BOUND, found)


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
