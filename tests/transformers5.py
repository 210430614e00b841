"""What the tests ask of transformers 5: one process of .venv-transformers5's Python that answers line by line.

As a module it is the tests' side, `Transformers5`; as a program it is the other side. A request is a JSON list, the
name of a function below and its arguments, which are paths; the answer is "" or an error's words as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

PYTHON = Path(__file__).parent.parent / ".venv-transformers5" / "bin" / "python"


class Transformers5:
    """The newest major of transformers, for as long as the tests run; a context manager."""

    def __enter__(self) -> Transformers5:
        assert PYTHON.exists(), "run `make transformers5`"
        words = [PYTHON, "-W", "ignore", __file__]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._scratch = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._scratch.cleanup()

    def _ask(self, *words: object) -> None:
        self._process.stdin.write(json.dumps([*map(str, words)]) + "\n")
        self._process.stdin.flush()
        while not (line := self._process.stdout.readline()).startswith('"answer: '):
            assert line, "the process ended"  # other lines are the libraries' own
        if problem := json.loads(line).removeprefix("answer: "):
            raise RuntimeError(problem)

    def logits(self, folder: Path, tokens: torch.Tensor, adapter: Path | str = "") -> torch.Tensor:
        """float32 [batch, sequence, vocabulary] of a model, with a peft adapter if one is given."""
        given, out = Path(self._scratch.name) / "tokens.pt", Path(self._scratch.name) / "logits.pt"
        torch.save(tokens, given)
        self._ask("logits", folder, given, out, adapter)
        return torch.load(out)

    def save(self, folder: Path, out: Path, *, stacks: bool = False) -> Path:
        """Load a model and its tokenizer, and save both as this major writes them, in BF16.

        Args:
            stacks: experts stay in stacks, as they are in memory.
        """
        self._ask("save", folder, out, "stacks" if stacks else "")
        return out

    def save_config(self, folder: Path) -> None:
        """Replace config.json and the tokenizer's files in place by those that this major writes of them."""
        self._ask("save_config", folder)


# ---------------------------------------------------------------------------- the other side


def _load(folder: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def logits(folder: str, tokens: str, out: str, adapter: str) -> None:
    model = _load(folder, torch.float32)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        torch.save(model(torch.load(tokens)).logits, out)


def save(folder: str, out: str, stacks: str) -> None:
    from transformers import AutoTokenizer

    _load(folder, torch.bfloat16).save_pretrained(out, save_original_format=not stacks)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


def save_config(folder: str) -> None:
    from transformers import AutoConfig, AutoTokenizer

    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)


def main() -> None:
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    functions = {"logits": logits, "save": save, "save_config": save_config}
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            functions[name](*arguments)
            problem = ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        print(json.dumps(f"answer: {problem}"), flush=True)


if __name__ == "__main__":
    main()
