"""Packages whose own code runs at their first use: they must be whole then. In a process of its own."""

from __future__ import annotations

import subprocess
import sys

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
for name in ("modelopt.torch", "scipy", "datasets", "transformers.modeling_utils", "nemo.collections.llm.bert"):
    assert name not in sys.modules, f"{name} was imported"
from nemo.collections import llm
assert llm.LlamaConfig is LlamaConfig and llm.finetune is finetune and llm.peft.LoRA is LoRA
assert llm.AlpacaDataModule and "nemo.collections.llm.bert" in sys.modules, "the whole of llm is not there"

import torchmetrics
import torch
accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=3)
assert accuracy(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1])) == torch.tensor(2 / 3)
assert torchmetrics.Metric is Metric and isinstance(accuracy, Metric)
assert torchmetrics.MetricCollection is MetricCollection and torchmetrics.__version__
assert lightning.pytorch.core.module.Metric is Metric

import wandb
assert "wandb.sdk" not in sys.modules, "wandb was imported"
assert callable(wandb.init) and "wandb.sdk" in sys.modules
from transformers import AutoModelForCausalLM  # it asks for sklearn
"""


def test_a_package_that_is_imported_later_is_whole_when_it_is_used():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
