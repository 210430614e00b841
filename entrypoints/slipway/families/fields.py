"""Which fields of config.json a family knows, and what becomes of each: used, without effect, or only some values.

Nothing that changes the forward pass is ignored. A field that no table names is refused unless it is switched off.
docs/checkpoints.md shows these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slipway.errors import DataError
from slipway.families.checks import Config
from slipway.options import suggestion


@dataclass(frozen=True)
class Field:
    """What becomes of a field.

    Args:
        what: for the docs.
        only: the values that are supported; empty: all of them, as far as the family's checks go.
    """

    what: str
    only: tuple[Any, ...] = ()


USED = Field("used")
NO_EFFECT = Field("no effect on the model")
IN_TRAINING = Field("no effect: training has its own setting")
Fields = Mapping[str, Field]


def only(*values: Any) -> Field:
    """A field of which some values alone are supported."""
    return Field(f"must be {' or '.join(repr(value) for value in values)}", values)


def each(field: Field, names: str) -> dict[str, Field]:
    """The same for each of these names, separated by spaces."""
    return dict.fromkeys(names.split(), field)


# What transformers writes into every config.json: for its own files, for tasks that are not language models, and for
# generation (which lies in generation_config.json today).
COMMON: Fields = {
    **each(USED, "model_type quantization_config compression_config"),
    **each(Field("written as bfloat16"), "torch_dtype dtype"),
    **each(
        NO_EFFECT,
        "architectures auto_map transformers_version _name_or_path name_or_path _commit_hash use_cache "
        "_attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation "
        "unsloth_version unsloth_fixed model_name "
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id prefix tokenizer_class "
        "return_dict return_dict_in_generate output_hidden_states output_attentions output_scores torchscript "
        "tf_legacy_loss use_bfloat16 is_decoder finetuning_task id2label label2id num_labels task_specific_params "
        "problem_type pruned_heads chunk_size_feed_forward cross_attention_hidden_size "
        "max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty "
        "temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
        "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id forced_eos_token_id "
        "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
    ),
    **each(IN_TRAINING, "attention_dropout hidden_dropout resid_pdrop embd_pdrop initializer_range"),
    **each(only(False), "is_encoder_decoder add_cross_attention tie_encoder_decoder"),
}


def check_fields(c: Config, where: Path, known: Fields) -> None:
    """DataError for a field of another value than the supported ones, or for one that nobody knows and that is on."""
    for name, value in c.items():
        if field := known.get(name):
            if field.only and value not in field.only:
                supported = " or ".join(repr(one) for one in field.only)
                raise DataError(
                    f"{where}: field {name} is {_short(value)}; for {c['model_type']} only {supported} is supported"
                )
        elif value not in (None, False) and value != [] and value != {}:
            raise DataError(
                f"{where}: unknown field {name} ({_short(value)}){suggestion(name, known)}; it may change the model: "
                "delete it from config.json only if it does not"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
