"""What a person can set of `preprocess`."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import date

from slipway.errors import UsageError
from slipway.options import LARGEST, check_group, option, suggestion
from slipway.untrusted import NotJson, parse_json


@dataclass(frozen=True)
class Wanted:
    """The options of `preprocess`."""

    tokenizer: str = option(..., "model whose tokenizer is used: a folder, hf://org/name[@revision] or nemo://name")
    # A sample must be shorter than seq_length, and two tokens are the least that teaches anything.
    seq_length: int | None = option(
        None, "sequence length of the training; texts are cut into windows of this length less one", unit="tokens",
        low=3, high=LARGEST, otherwise="that of --recipe, else the shortest that a shipped recipe trains with",
    )  # fmt: skip
    long: str = option(
        "refuse",
        "samples that are too long; cut = keep the beginning, drop = leave them out, refuse = leave them out, but stop "
        "if more than 5% of all tokens would be lost; texts are never lost",
        choices=("cut", "drop", "refuse"),
    )
    learn: str = option(
        "all", "which turns of the assistant are learned: all, or the last one of each chat", choices=("all", "last")
    )
    pairs: str = option(
        "auto",
        "how a prompt and its completion are written: text = as they are, chat = in the chat template, auto = chat for "
        "instructions and questions where the tokenizer has a template, else text",
        choices=("auto", "chat", "text"),
    )
    map: list[str] | None = option(
        None, "THEIRS=OURS: a key of the rows and the key it stands for; can be given more than once"
    )
    template_args: str = option("{}", "JSON object of arguments for the chat template: '{\"enable_thinking\": false}'")
    date: str | None = option(
        None, "the day that templates which write the day's date get, YYYY-MM-DD", otherwise="that of the newest file"
    )
    split: str | None = option(None, "split of a folder or of a data set of the hub", otherwise="train")
    eval_split: str = option("", "share of the rows to hold out, such as 2%; they go to OUT.eval.jsonl or OUT.eval.bin")
    append_eos: bool = option(True, "add the tokenizer's eos_token after each text and each completion")
    overwrite: bool = option(False, "replace OUT, once the new output is whole")
    show: int = option(1, "samples to print at the start, with what is learned in ⟦ ⟧", low=0, high=1000)
    workers: int | None = option(None, "processes that tokenise", low=1, high=LARGEST, otherwise="one per core")

    def check(self) -> None:
        """UsageError for a value that is out of range."""
        check_group(self)
        self.renamed()
        self.held_out()
        self.arguments()
        if self.date is not None and not _is_day(self.date):
            raise UsageError(f"--date {self.date} is not a day; give YYYY-MM-DD")

    def renamed(self) -> dict[str, str]:
        """Their key → ours."""
        from slipway.tokens.forms import KEYS  # numpy, which `slipway --help` must not wait for

        found = {}
        for entry in self.map or ():
            theirs, equals, ours = entry.partition("=")
            if not theirs or not equals:
                raise UsageError(f"--map {entry} is not THEIRS=OURS; give such as --map reply=completion")
            if ours not in KEYS:
                turned = f"; write --map {ours}={theirs}" if theirs in KEYS else suggestion(ours, KEYS)
                raise UsageError(f"--map {entry}: {ours!r} is no key of ours{turned}; there are {', '.join(KEYS)}")
            found[theirs] = ours
        return found

    def held_out(self) -> float:
        """The share of --eval-split."""
        if not self.eval_split:
            return 0.0
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", self.eval_split)
        share = float(match[1]) / (100 if match[2] else 1) if match else 0.0
        if not 0 < share < 1:
            raise UsageError(f"--eval-split {self.eval_split} is not a share; give such as 2% or 0.02")
        return share

    def arguments(self) -> str:
        """The object of --template-args, as JSON."""
        try:
            found = parse_json(self.template_args)
        except NotJson:
            found = None
        if not isinstance(found, dict):
            raise UsageError(f"--template-args {self.template_args} is not a JSON object; give '{{\"name\": value}}'")
        return json.dumps(found, sort_keys=True)


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True
