"""`slipway submit`: a chain of commands as jobs of a cluster, from a client."""

from __future__ import annotations

from typing import Any

from slipway.cluster import runs
from slipway.cluster.chain import Kind
from slipway.cluster.submission import Answer, Wanted
from slipway.cluster.submission import submit as submit_chain
from slipway.commands import (
    bench,
    dequant,
    doctor,
    export,
    extract_heads,
    import_checkpoint,
    init,
    inspect,
    merge_heads,
    preprocess,
    train,
    verify,
)
from slipway.options import take, with_options

# What can be a step, and which of its arguments name something on the cluster.
STEPS = {
    "doctor": Kind(doctor.doctor, ("out", "model", "run_token_file"), whole=True),
    "dequant": Kind(dequant.dequant, ("src", "dst")),
    "init": Kind(init.init, ("config", "out")),
    "import": Kind(import_checkpoint.import_checkpoint, ("src", "dst", "adapter", "config")),
    "export": Kind(export.export, ("ckpt", "out", "base", "config")),
    "inspect": Kind(inspect.inspect, ("path", "config")),
    "verify": Kind(verify.verify, ("a", "b", "config")),
    "preprocess": Kind(preprocess.preprocess, ("data", "out", "tokenizer", "recipe")),
    "train": Kind(
        train.train, ("model", "data", "out", "eval_data", "adapter", "recipe", "config", "run_token_file"), whole=True
    ),
    "bench": Kind(bench.bench, ("recipe", "config", "run_token_file")),
    "extract-heads": Kind(extract_heads.extract_heads, ("ckpt", "out")),
    "merge-heads": Kind(merge_heads.merge_heads, ("heads", "base", "out")),
}


@with_options(Wanted)
def submit(words: list[str], **options: Any) -> Answer | runs.Overview:
    """Run a chain of commands on a cluster, from any machine that reaches it by ssh or kubectl.

      slipway submit --cluster lab.toml -- import SRC OUT then train --model OUT … then export …
      slipway submit status [RUN]     what each step does, and how far the training is
      slipway submit logs [RUN]       what a step has printed; --follow goes on with it
      slipway submit stop [RUN]       save, and end; the same chain, submitted again, goes on from there
      slipway submit cancel [RUN]     take all its jobs out of the cluster

    Each step is a job that begins when the one before has ended well. Words and paths are checked before anything is
    sent, and a chain is submitted whole or not at all. RUN is the newest where it is not given.

    Args:
        words: the steps, with the word `then` between them; or status, logs, stop or cancel, and a run.
    """
    return submit_chain(words, take(Wanted, options), STEPS)
