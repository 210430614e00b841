"""Three hundred good inputs, spoiled at random with a new seed each time; tests/fuzz.py tries any number of them.

The seed stands at the head of pytest's report (conftest.py), whichever process runs this.
"""

from __future__ import annotations

import os

import fuzz


def test_spoiled_inputs_are_said_in_bounded_time_and_memory():
    seed = int(os.environ["SLIPWAY_FUZZ_SEED"])
    codes, wrong = fuzz.run(seed, 300)
    assert wrong == [] and codes[65] > 30, (seed, codes)
