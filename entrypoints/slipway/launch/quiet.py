"""What the libraries print about themselves stays away from the people who read what Slipway prints."""

from __future__ import annotations

import logging
import os
import warnings


def quiet() -> None:
    """Hide the libraries' warnings and notes, here and in the processes that this one starts; their errors are shown.

    Call it before torch is imported: torch warns while it is imported. SLIPWAY_VERBOSE=1 shows everything.
    """
    if os.environ.get("SLIPWAY_VERBOSE") == "1":
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("PYTHONWARNINGS", "ignore")
    logging.disable(logging.WARNING)
    # A handler of NeMo's that cannot write its file, because the disk is full, would print a traceback per message.
    logging.raiseExceptions = False
    # NeMo's telemetry reports an error for each run that ends by an exception, a request to stop among them.
    telemetry = logging.getLogger("nv_one_logger")
    telemetry.propagate = False
    telemetry.addHandler(logging.NullHandler())
