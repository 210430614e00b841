"""Peak memory of dequant, import and export over the size of the model: it must not grow.

The peer holds the model as most converters do: every tensor is loaded, decoded and kept, then all are saved.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from slipway.report import human_bytes

from benchmarks.common import arguments, interpreter, make_model, measure, print_table, scratch, slipway, verdict

LIMIT = 2e9
GROWTH = 1.10
COMMANDS = ("dequant", "import", "export")


def main() -> None:
    parser = arguments(__doc__, nargs="+", default=[1.0, 4.0])
    parser.add_argument("--peer-gigabytes", type=float, default=1.0, help="size at which the peer runs, 0 = not")
    parser.add_argument("--peer", nargs=2, type=Path, metavar=("SRC", "DST"), help="run the peer, nothing else")
    options = parser.parse_args()
    if options.peer:
        return hold_everything(*options.peer)
    rows, peaks = [], {command: [] for command in COMMANDS}
    with scratch(options.scratch, 2 * max(options.gigabytes)) as folder:
        for gigabytes in sorted(options.gigabytes):
            make_model(folder / "hf", options, gigabytes)
            sizes = [f"{gigabytes:g} GB"]
            for command in COMMANDS:
                source = folder / ("import" if command == "export" else "hf")
                peaks[command].append(slipway(command, source, folder / command).peak)
                shutil.rmtree(folder / ("hf" if command == "import" else command))
            rows.append(sizes + [human_bytes(peaks[command][-1]) for command in COMMANDS])
            shutil.rmtree(folder / "import")
        if options.peer_gigabytes:
            make_model(folder / "hf", options, options.peer_gigabytes)
            peer = measure("-m", "benchmarks.memory", "--peer", folder / "hf", folder / "out").peak
            rows.append([f"peer, {options.peer_gigabytes:g} GB", human_bytes(peer), "", ""])
    print(f"peak memory, {options.model} in {options.format}; Python alone {human_bytes(interpreter().peak)}")
    print_table(["model in BF16", *COMMANDS], rows)
    for command, found in peaks.items():
        growth = found[-1] / found[0]
        passed = growth <= GROWTH and max(found) < LIMIT
        print(verdict(f"{command}: largest / smallest = {growth:.3f} (≤ {GROWTH}), below {human_bytes(LIMIT)}", passed))


def hold_everything(source: Path, target: Path) -> None:
    """The peer: one file's tensors after the other into one dictionary, decoded, then saved."""
    from safetensors.torch import load_file, save_file
    from slipway.checkpoint.quantization import decode_fp8_block, decode_mxfp4
    from slipway.tensors.bits import from_torch, to_torch

    stored = {name: tensor for file in sorted(source.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    model = {}
    for name, tensor in stored.items():
        if name.endswith("_blocks"):
            scales = stored[name.removesuffix("_blocks") + "_scales"]
            model[name] = to_torch(decode_mxfp4(tensor.numpy(), scales.numpy()), "BF16")
        elif (scale := f"{name}_scale_inv") in stored:
            decoded = decode_fp8_block(from_torch(tensor), stored[scale].numpy(), (128, 128))
            model[name] = to_torch(decoded, "BF16")
        elif not name.endswith(("_scales", "_scale_inv")):
            model[name] = tensor
    target.mkdir()
    save_file(model, target / "model.safetensors")


if __name__ == "__main__":
    sys.exit(main())
