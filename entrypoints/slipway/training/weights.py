"""How many weights the parts of a model have, by its config.json alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slipway.families import by_model_type
from slipway.families.checks import EXPERTS
from slipway.families.mtp import MTP, mtp_layers

STACKED = ".experts.experts."


@dataclass(frozen=True)
class Layer:
    """Number of weights of a layer: outside its experts, and of one of its `count` experts."""

    plain: float
    expert: float = 0.0
    count: int = 0


@dataclass(frozen=True)
class Parts:
    """Number of weights of the parts of a model."""

    embedding: int
    output: int
    layers: list[Layer]
    ahead: list[Layer]  # for multi-token prediction; the last stage has them

    @property
    def total(self) -> float:
        layers = [*self.layers, *self.ahead]
        return self.embedding + self.output + sum(part.plain + part.expert * part.count for part in layers)


def has_experts(c: Mapping[str, Any]) -> bool:
    """Whether a model with this config.json is a mixture of experts; one that is none may have such fields too."""
    return any(layer.expert for layer in parts_of(c).layers)


def experts_of(c: Mapping[str, Any]) -> int:
    """How many routed experts a layer of this model has; 0 in a dense one."""
    return _said(c) if has_experts(c) else 0


def _said(c: Mapping[str, Any]) -> int:
    return next((c[key] for key in EXPERTS if key in c), 0)


def parts_of(c: Mapping[str, Any]) -> Parts:
    """The weights of a model. They are counted on a small one with one layer of each kind and two experts."""
    # The rules of a family list every tensor. The largest models have tens of thousands, and --dry-run must be quick.
    dense = c.get("first_k_dense_replace", 0)
    few = {**c, "num_hidden_layers": dense + 1, MTP: min(1, mtp_layers(c))} | {key: 2 for key in EXPERTS if key in c}
    if "layer_types" in c:
        few["layer_types"] = c["layer_types"][: dense + 1]
    count = _said(c)
    # The place after the layers is that of the one for multi-token prediction.
    plain, experts, outside = [0.0] * (dense + 2), [0.0] * (dense + 2), {"embedding": 0, "output_layer": 0}
    for name, info in by_model_type()[c["model_type"]].rules(few).megatron.items():
        rest = name.partition(".layers.")[2]
        size = math.prod(info.shape)
        if not rest:
            if name.split(".")[0] in outside:
                outside[name.split(".")[0]] += size
            continue
        number = rest.split(".")[0]
        numbers = [int(number)] if number.isdigit() else range(dense + 1)
        numbers = [dense + 1] if name.startswith("mtp.") else numbers
        for layer in numbers:
            into = experts if STACKED in name else plain
            into[layer] += size / len(numbers) / (2 if STACKED in name else 1)
    layers = [Layer(part, expert, count if expert else 0) for part, expert in zip(plain, experts, strict=True)]
    ahead = [layers.pop()] * mtp_layers(c)
    layers += [layers[-1]] * (c["num_hidden_layers"] - dense - 1)
    return Parts(outside["embedding"], outside["output_layer"], layers, ahead)
