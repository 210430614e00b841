"""`slipway export` beside NeMo's own exporter, on a checkpoint that NeMo's own importer made: seconds and peak memory.

NeMo runs on the CPU, where plain layers have the names of Transformer Engine's (tests/nemo_on_cpu.py). The two exports
are compared, tensor by tensor.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path

from slipway.report import human_bytes

from benchmarks.common import Measured, arguments, make_model, measure, print_table, scratch, size_of, slipway, verdict
from benchmarks.throughput import warm

NEMO = Path(__file__).parents[1] / "tests" / "nemo_on_cpu.py"
MODULES = {"llama31": "llama", "qwen25": "qwen2"}  # family → NeMo's module
# The tokenizer of a tiny model, with as many tokens as the large one: NeMo's exporter cuts the embedding to them.
TOKENIZER = """
import json, shutil, sys
from pathlib import Path
from tokenizers import Tokenizer
from slipway.families import FAMILIES, fabricate
tiny, model = map(Path, sys.argv[1:])
fabricate.fabricate(tiny, FAMILIES["qwen25"].tiny_config(), ["some words"] * 20, quantized=False)
for file in tiny.glob("*token*"):
    shutil.copyfile(file, model / file.name)
tokens = Tokenizer.from_file(str(model / "tokenizer.json"))
wanted = json.loads((model / "config.json").read_text())["vocab_size"]
tokens.add_tokens([f"<{number}>" for number in range(wanted - tokens.get_vocab_size())])
tokens.save(str(model / "tokenizer.json"))
"""


def main() -> None:
    parser = arguments(__doc__, default=1.5)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn; the medians count")
    parser.set_defaults(model="llama31", format="bf16")
    options = parser.parse_args()
    module = MODULES[options.model]
    with scratch(options.scratch, 6 * options.gigabytes) as folder:
        hf, made = folder / "hf", folder / "made"
        make_model(hf, options, options.gigabytes)
        measure("-c", TOKENIZER, folder / "tiny", hf)
        nemo(folder, "import", module, hf, made)
        shutil.rmtree(hf)
        runs = [both(folder, module, made) for _ in range(options.repeats)]
        size = size_of(made)
    ours, theirs, without = (list(column) for column in zip(*runs, strict=True))
    print(f"{options.model}, {human_bytes(size)}, made by NeMo's importer; medians of {options.repeats}")
    seconds, other = (statistics.median(one.seconds for one in found) for found in (ours, theirs))
    peak, other_peak = (max(one.peak for one in found) for found in (ours, theirs))
    work = statistics.median(without)
    rows = [
        ["slipway export", f"{seconds:.1f}", f"{seconds:.1f}", human_bytes(peak)],
        ["NeMo's exporter", f"{other:.1f}", f"{work:.1f}", human_bytes(other_peak)],
        ["ratio", f"{other / seconds:.1f}", f"{work / seconds:.1f}", f"{other_peak / peak:.1f}"],
    ]
    print_table(["", "seconds", "without NeMo's import", "peak memory"], rows)
    print(verdict("both exports are the same model, bit for bit", True))


def both(folder: Path, module: str, made: Path) -> tuple[Measured, Measured, float]:
    """(what ours took, what NeMo's took, its seconds without its imports), one after the other."""
    warm(made)
    ours = slipway("export", made, folder / "ours")
    warm(made)
    theirs, seconds = nemo(folder, "export", module, made, folder / "theirs")
    slipway("verify", folder / "ours", folder / "theirs")
    shutil.rmtree(folder / "ours")
    shutil.rmtree(folder / "theirs")
    return ours, theirs, seconds


def nemo(folder: Path, *words: object) -> tuple[Measured, float]:
    """(what NeMo took, its seconds without its imports)."""
    took = measure(NEMO, *words, folder / "seconds")
    return took, float((folder / "seconds").read_text())


if __name__ == "__main__":
    sys.exit(main())
