"""What the plans of several commands have in common: weights in torch_dist, config.json, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slipway.checkpoint import archive, nemo_context, torch_dist
from slipway.checkpoint.companions import Companions
from slipway.checkpoint.formats import IN_CONFIG as QUANTIZATION
from slipway.checkpoint.opened import Opened
from slipway.checkpoint.source import NAME
from slipway.checkpoint.stream import Piece, Plan, Write
from slipway.families import rules
from slipway.families.checks import Config

Details = dict[str, Any]  # what the summary of a command says besides sizes and time


def bf16_config(config: Config) -> dict[str, Any]:
    """The config.json of the dequantised model."""
    return {**{key: value for key, value in config.items() if key not in QUANTIZATION}, "torch_dtype": "bfloat16"}


def torch_dist_weights(opened: Opened, folder: str, prefix: str) -> Plan:
    """The part of a plan that is weights in torch_dist.

    Args:
        folder: where they go, below the output.
        prefix: of megatron-core's keys.
    """
    model = opened.model
    tensors = model.megatron
    chunks = [ref for cell in model.cells for ref in cell.megatron]
    layout = torch_dist.Layout(tensors, chunks, model.extra_state, prefix)

    def piece(cell: rules.Cell) -> Piece:
        def work() -> Iterable[Write]:
            for ref, part in zip(cell.megatron, opened.megatron_parts(cell), strict=True):
                file, offset, length = layout.places[ref]
                info = tensors[ref.name]
                blob = archive.write(part.reshape(torch_dist.chunk_sizes(ref, info.shape)), info.dtype)
                assert sum(map(len, blob)) == length, f"the archive of {ref} is not as long as planned"
                for content in blob:
                    yield f"{folder}/{file}", offset, content
                    offset += len(content)

        return Piece(opened.source_bytes(cell), work)

    def extra_state() -> Iterable[Write]:
        return [(f"{folder}/{file}", offset, layout.empty_state) for file, offset, _ in layout.extra.values()]

    small = {
        f"{folder}/metadata.json": torch_dist.FORMAT.encode(),
        f"{folder}/common.pt": torch_dist.common_state(),
        f"{folder}/.metadata": layout.metadata(),
    }
    sizes = {f"{folder}/{file}": size for file, size in layout.sizes.items()}
    return Plan(sizes, [*map(piece, model.cells), Piece(0, extra_state)], small, {}, [])


def as_json(content: Mapping[str, Any]) -> bytes:
    """A file of JSON."""
    return (json.dumps(content, indent=2) + "\n").encode()


def context_of(opened: Opened, name: str) -> tuple[dict[str, bytes], dict[str, Path]]:
    """(small files, copies) of the context of a NeMo checkpoint: by their path in it.

    Args:
        name: what other programs load the model by, to be noted.
    """
    described = bf16_config(opened.config)
    noted = {**described, NAME: name} if name else described
    others = opened.companions
    tokenizer = others.of_tokenizer().under(f"context/{nemo_context.TOKENIZER}")
    has_one = others.has_tokenizer
    context = nemo_context.context_files(*opened.family.nemo_model(opened.config), noted, tokenizer=has_one)
    kept = others.under(f"context/{nemo_context.HF_FILES}")
    small = {
        **{f"context/{name}": content for name, content in context.items()},
        # transformers finds a tokenizer without a class by the model's type.
        **({f"context/{nemo_context.TOKENIZER}/config.json": as_json(described)} if has_one else {}),
        **tokenizer.small,
        **kept.small,
    }
    return small, {**tokenizer.copies, **kept.copies}


def said_of(notes: Iterable[str], others: Companions) -> Details:
    """What the summary says of how a model was read, and of what stayed behind."""
    left_out = (
        f"left out: {', '.join(others.left_out)}, which no tool of transformers writes" if others.left_out else ""
    )
    said = [*notes, *filter(None, [left_out])]
    return {"notes": said} if said else {}
