"""A model's layers for multi-token prediction, by its config.json: they come after the others."""

from __future__ import annotations

from collections.abc import Iterable

from slipway.families.checks import Config

MTP = "num_nextn_predict_layers"


def mtp_layers(c: Config) -> int:
    """Number of layers for multi-token prediction."""
    return c.get(MTP) or 0


def without_mtp(c: Config) -> Config:
    """The config.json of the same model without such layers."""
    return {**c, MTP: 0} if MTP in c else c


def has_mtp(c: Config, names: Iterable[str]) -> bool:
    """The tensors' names show such a layer."""
    return any(name.startswith(f"model.layers.{c['num_hidden_layers']}.") for name in names)
