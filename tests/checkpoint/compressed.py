"""compressed-tensors' own compressors, in .venv-transformers5: what they write, and what they make of it again.

python compressed.py IN OUT: IN holds weights by a name; OUT gets for each its compressed parts as NAME.part, and what
the library decompresses them to as NAME.decompressed, for the form that the first word of NAME is.
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file

MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
NV = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
FORMS = {
    "nvfp4": ("nvfp4-pack-quantized", QuantizationArgs(num_bits=4, type="float", **NV)),
    "mxfp4": ("mxfp4-pack-quantized", QuantizationArgs(num_bits=4, **MX)),
    "mxfp8": ("mxfp8-quantized", QuantizationArgs(num_bits=8, **MX)),
    "channel": ("float-quantized", QuantizationArgs(num_bits=8, type="float", strategy="channel")),
    "tensor": ("float-quantized", QuantizationArgs(num_bits=8, type="float", strategy="tensor")),
}


def scales_of(weight: torch.Tensor, args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """weight_scale, and weight_global_scale where the form has one, as the library's observers compute them."""
    groups = {"tensor": weight.reshape(1, -1), "channel": weight}.get(args.strategy)
    if groups is None:
        groups = weight.unflatten(-1, (-1, args.group_size))
    low, high = groups.amin(-1), groups.amax(-1)
    found = {}
    if args.strategy == "tensor_group":
        found["weight_global_scale"] = generate_gparam(weight.min().reshape(1), weight.max().reshape(1))
    scale, _ = calculate_qparams(low, high, args, global_scale=found.get("weight_global_scale"))
    return {"weight_scale": scale.reshape(-1, 1) if args.strategy == "channel" else scale, **found}


def main() -> None:
    out: dict[str, torch.Tensor] = {}
    for name, weight in load_file(sys.argv[1]).items():
        form, args = FORMS[name.split(".")[0]]
        compressor = BaseCompressor.get_value_from_registry(form)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        parts = compressor.compress({"weight": weight, **scales_of(weight, args)}, scheme)
        again = compressor.decompress(parts, scheme)["weight"]
        out |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        out[f"{name}.decompressed"] = again.contiguous()
    save_file(out, sys.argv[2])


if __name__ == "__main__":
    main()
