"""The helper through which everything of upstream is changed: what it refuses, and that twice is once."""

from __future__ import annotations

import types

import pytest
from slipway.errors import PreflightError
from slipway.training import patches
from slipway.training.patches import TORCH, Upstream, define, replace, wrap


@pytest.fixture
def owner() -> types.ModuleType:
    module = types.ModuleType("owner")
    module.double = lambda x: 2 * x
    return module


def test_an_attribute_is_wrapped_once(owner):
    for _ in range(2):
        wrap(owner, "double", lambda double: lambda x: double(x) + 1, TORCH)
    assert owner.double(3) == 7 and patches.APPLIED["owner.double"].before(3) == 6


def test_a_second_change_of_an_attribute_is_not_left_out_in_silence(owner):
    wrap(owner, "double", _plus_one, TORCH)
    with pytest.raises(
        RuntimeError, match=r"owner\.double is changed by _plus_one already: make one change of it and "
    ):
        wrap(owner, "double", lambda double: lambda x: double(x) + 2, TORCH)
    with pytest.raises(RuntimeError, match="already"):
        replace(owner, "double", None, TORCH)
    wrap(owner, "double", _plus_one, TORCH)
    assert owner.double(3) == 7


def _plus_one(double):
    return lambda x: double(x) + 1


def test_what_upstream_forgot_is_defined(owner):
    for _ in range(2):
        define(owner, "kernel", None, TORCH)
    assert owner.kernel is None and patches.APPLIED["owner.kernel"].before is patches.MISSING


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda owner: replace(owner, "triple", None, TORCH), f"torch {TORCH.version} has no owner.triple; "),
        (lambda owner: define(owner, "double", None, TORCH), f"torch {TORCH.version} has its own owner.double; "),
        (
            lambda owner: replace(owner, "double", None, Upstream("torch", "1.0")),
            f"torch is version {TORCH.version}, but Slipway changes owner.double of version 1.0; ",
        ),
    ],
)
def test_another_upstream_is_refused_in_one_line(owner, change, message):
    before = dict(vars(owner))
    with pytest.raises(PreflightError) as error:
        change(owner)
    assert str(error.value) == message + patches.CURE and vars(owner) == before


def test_the_patches_are_for_the_locked_versions():
    for upstream in (patches.MEGATRON, patches.NEMO, patches.LIGHTNING, patches.TORCH):
        assert patches.installed(upstream.package) == upstream.version


def test_an_instance_is_changed_alone_and_not_kept(owner):
    class Trainer:
        def stop(self) -> str:
            return "stop"

    one, other = Trainer(), Trainer()
    replace(one, "stop", lambda: "go", TORCH)
    assert (one.stop(), other.stop()) == ("go", "stop")
    assert not any("Trainer" in name for name in patches.APPLIED)
