"""Packages whose own code runs at their first use: they must be whole then. In a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CHECK = """
import sys
from slipway.training.imports import import_less
import_less()
import_less()  # a second call changes nothing

from torchmetrics import Metric, MetricCollection
import lightning.pytorch
assert "torchmetrics.functional" not in sys.modules, "all metrics were imported"
assert "sklearn" not in sys.modules or sys.modules["sklearn"] is None

from nemo.collections.llm.api import finetune
from nemo.collections.llm.gpt.model.llama import LlamaConfig
from nemo.collections.llm.peft import LoRA
left_out = ["modelopt.torch", "scipy", "datasets", "transformers.modeling_utils", "nemo.collections.llm.bert", "sympy"]
left_out += ["matplotlib", "onnxscript", "boto3.session", "torch._dynamo.utils"]
left_out += ["nemo_run.core", "pandas.core", "zarr.core"]
for name in left_out:
    assert name not in sys.modules, f"{name} was imported"
import torch
leaf = torch.ones(2, requires_grad=True)
assert torch.equal(*torch.autograd.grad(leaf * 3, leaf, torch.ones(2)), torch.full([2], 3.0))
try:
    torch.autograd.grad(leaf * 3, leaf, torch.ones(3))
except RuntimeError as error:
    assert "Mismatch in shape" in str(error)
else:
    raise AssertionError("a gradient of another shape was taken")
assert "sympy" not in sys.modules, "sympy was imported for two shapes"
half = torch.compile(lambda x: x / 2, backend="eager")
assert "torch._dynamo.utils" not in sys.modules, "torch's compiler was imported before it had anything to compile"
assert half(torch.ones(1)) == 0.5 and "torch._dynamo.utils" in sys.modules
import torch._dynamo
assert torch._dynamo.disable(half) is not half and not torch._dynamo.config.disable
from torch.fx.experimental import symbolic_shapes
assert symbolic_shapes.statically_known_true(1 < 2) and "sympy" in sys.modules

from nemo.collections import llm
assert llm.LlamaConfig is LlamaConfig and llm.finetune is finetune and llm.peft.LoRA is LoRA
assert llm.AlpacaDataModule and "nemo.collections.llm.bert" in sys.modules, "the whole of llm is not there"

import torchmetrics
accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
assert accuracy(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])) == torch.tensor(2 / 3)
assert torchmetrics.Metric is Metric and isinstance(accuracy, Metric)
assert torchmetrics.MetricCollection is MetricCollection and torchmetrics.__version__
assert lightning.pytorch.core.module.Metric is Metric

import wandb
assert "wandb.sdk" not in sys.modules, "wandb was imported"
assert callable(wandb.init) and "wandb.sdk" in sys.modules

from pandas.core.frame import DataFrame  # a module in a package that waits
import pandas
assert pandas.DataFrame is DataFrame and sys.modules["pandas.core.frame"] is pandas.core.frame
assert pandas.core.frame.__spec__.name == "pandas.core.frame"
from nemo_run.config import Config
import nemo_run
assert nemo_run.Config is Config and callable(nemo_run.run)

from transformers import AutoModelForCausalLM  # it asks for sklearn
"""


WITHOUT_A_TOKENIZER = """
import sys
from slipway.training.imports import import_less
import_less(has_tokenizer=False)

from nemo.collections.llm.api import finetune
from nemo.collections.llm.gpt.model import base, deepseek, gpt_oss, llama, qwen2, qwen3
from nemo.collections.llm.peft import LoRA
for name in ("transformers.utils", "tokenizers", "jinja2"):
    assert name not in sys.modules, f"{name} was imported"
"""


@pytest.mark.parametrize("check", [CHECK, WITHOUT_A_TOKENIZER], ids=["all", "without a tokenizer"])
def test_a_package_that_is_imported_later_is_whole_when_it_is_used(check):
    # Where another test in this process had no GPU, torch is told to compile nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    done = subprocess.run([sys.executable, "-c", check], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
