"""Megatron on a machine without a GPU, in an image that has what only runs on one."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest


def test_what_runs_on_gpus_alone_counts_as_not_installed(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('no GPU driver')")
    code = (
        "from slipway.training import cpu; cpu.enable(); "
        "from megatron.core.extensions import transformer_engine as te; "
        "from megatron.core.optimizer import clip_grads; "
        "print(te.HAVE_TE, clip_grads.multi_tensor_applier.__module__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False megatron.core.utils", done.stderr[-2000:]


def test_it_must_be_asked_for_before_they_are_imported(monkeypatch):
    from slipway.training import cpu

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(RuntimeError, match="apex is imported already"):
        cpu.enable()
