"""Three hundred good inputs, spoiled at random with a new seed each time; tests/fuzz.py tries any number of them."""

from __future__ import annotations

import os

import fuzz


def test_spoiled_inputs_are_said_in_bounded_time_and_memory(capsys):
    seed = int(os.environ.get("SLIPWAY_FUZZ_SEED") or int.from_bytes(os.urandom(4), "big"))
    with capsys.disabled():
        print(f"\nfuzz: seed {seed} (SLIPWAY_FUZZ_SEED={seed} gives the same inputs)", flush=True)
    codes, wrong = fuzz.run(seed, 300)
    assert wrong == [] and codes[65] > 30, (seed, codes)
