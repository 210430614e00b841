"""The proof of a conversion: transformers and NeMo compute the same logits, before and after."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import KINDS, make_model
from safetensors.torch import load_file

from entrypoints.export import export
from entrypoints.import_ import import_

# Longer than the length from which rope is scaled, and than every sliding window.
LENGTH = 160
# Of the logits' standard deviation. The same float32 arithmetic in another order: some units in the last place (2^-23
# of a value) over two to four layers. A shifted window, a wrong scale or a missing transpose is off by 0.01 and more.
BOUND = 2e-5


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [batch, sequence, vocabulary] by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(tokens).logits


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_the_same_in_transformers_and_nemo_and_after_export(kind, tmp_path):
    from entrypoints.training.forward import logits_of

    source = make_model(tmp_path / "hf", kind, quantized=False)
    import_(str(source), str(tmp_path / "nemo"))
    export(str(tmp_path / "nemo"), str(tmp_path / "exported"))
    before, after = tensors(source), tensors(tmp_path / "exported")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], part) and after[name].dtype == part.dtype for name, part in before.items())

    tokens = torch.randint(5, 512, (2, LENGTH), generator=torch.Generator().manual_seed(7))
    wanted = reference_logits(source, tokens)
    assert torch.equal(reference_logits(tmp_path / "exported", tokens), wanted)
    found = logits_of(tmp_path / "nemo", tokens)
    difference = ((found - wanted).abs().max() / wanted.std()).item()
    print(f"{kind}: max |difference| is {difference:.1e} of the standard deviation {wanted.std():.2f}")
    assert wanted.std() > 0.3 and difference < BOUND
