"""Planning DeepSeek-V3 at its full size: 671 B parameters in FP8 with the layer for multi-token prediction.

The model is sparse files of the true sizes: headers are real, the data is holes. Beside the plan's seconds and memory
stands what Python takes by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from slipway.report import human_bytes

from benchmarks.common import interpreter, measure, print_table, slipway, verdict

SECONDS, MEMORY = 60.0, 1e9
# MindSpeed-LLM's layout for training on 512 ranks.
CLASSIC = (
    "--tensor-parallel-size=2", "--pipeline-parallel-size=8", "--expert-parallel-size=32", "--num-layers=64",
    "--noop-layers=47,62,63", "--num-layers-per-virtual-pipeline-stage=2", "--moe-grouped-gemm",
)  # fmt: skip
SHARD_BYTES = 4_300_000_000  # 163 files
SIZES = {
    "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61,
    "num_attention_heads": 128, "num_key_value_heads": 128, "vocab_size": 129280, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "first_k_dense_replace": 3, "max_position_embeddings": 163840,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="make the sparse model, nothing else")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), help="folder to work in")
    options = parser.parse_args()
    if options.make:
        return make(options.make)
    with tempfile.TemporaryDirectory(prefix="slipway-bench-", dir=options.scratch) as folder:
        model = Path(folder) / "deepseek_v3"
        measure("-m", "benchmarks.planning", "--make", model)
        start, rows, lines = interpreter(), [], []
        rows.append(["Python alone", f"{start.seconds:.1f}", human_bytes(start.peak)])
        for words in (["dequant"], ["import"], ["import", "--mtp"], ["import", "--format=classic", *CLASSIC]):
            command = [words[0], model, Path(folder) / "out", *words[1:], "--dry-run"]
            found = slipway(*command)
            shown = " ".join(words).replace(" ".join(CLASSIC), "TP2 PP8 EP32")
            rows.append([shown, f"{found.seconds:.1f}", human_bytes(found.peak)])
            passed = found.seconds < SECONDS and found.peak < MEMORY
            lines.append(verdict(f"{shown}: below {SECONDS:g} s and {human_bytes(MEMORY)}", passed))
            words = [sys.executable, "-m", "slipway.cli", *map(str, command)]
            lines.append(subprocess.run(words, capture_output=True, text=True).stdout.strip().replace(folder, "…"))
    print_table(["--dry-run", "seconds", "peak memory"], rows)
    print("\n".join(lines))


def make(folder: Path) -> None:
    """config.json, index and 163 files that are holes after their headers."""
    from slipway.checkpoint.huggingface import INDEX, Layout
    from slipway.families import deepseek_v3

    from benchmarks.synthetic import FP8_BLOCK, stored_as

    config = {**deepseek_v3.tiny_config(), **SIZES}
    tensors = {}
    for name, info in deepseek_v3.rules(config).hf.items():
        tensors |= stored_as(name, info, "fp8")
    layout = Layout(tensors, SHARD_BYTES)
    folder.mkdir()
    for name, header in layout.headers.items():
        (folder / name).write_bytes(header)
        os.truncate(folder / name, layout.sizes[name])
    about = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    (folder / INDEX).write_bytes(layout.index())


if __name__ == "__main__":
    sys.exit(main())
