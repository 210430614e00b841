"""config.json from what NeMo, Megatron-Bridge or Megatron-LM say of a model in their own fields.

All three name the fields of Megatron's TransformerConfig, with a few of their own. `Described` has them under the names
of NeMo's configurations. A family turns them into its config.json (`hf_config`), and the way back (`nemo_model`) shows
whether that says the same: a field that differs is an error, and so is one that no config.json of the family can say.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slipway.errors import DataError
from slipway.families.checks import Config

if TYPE_CHECKING:
    from slipway.families import Family

GIVE = "give the model's config.json with --config"
# Megatron-LM's arguments and Megatron-Bridge's fields → NeMo's names.
OTHER_NAMES = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "swiglu": "gated_linear_unit",
    "rope_scaling_factor": "scale_factor",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# What Llama 3.1's scaling has in Megatron-LM and Megatron-Bridge, which have a field for the factor alone.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
# Fields that change what a model computes, and the value that they have in every family's model unless the family says
# otherwise (`MEGATRON`).
PLAIN: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False,
    "activation_func": "silu",
    "activation_func_clamp_value": None,
    "glu_linear_offset": 0.0,
    "softmax_type": "vanilla",
    "softmax_scale": None,
    "window_size": None,
    "no_rope_freq": None,
    "mrope_section": None,
    "multi_latent_attention": False,
    "qk_layernorm": False,
    "add_qkv_bias": False,
    "num_moe_experts": None,
    "moe_shared_expert_intermediate_size": None,
    "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_apply_probs_on_input": False,
    "moe_router_topk_limited_devices": None,
    "attn_logit_softcapping": None,
    "attention_output_gate": False,
    "heterogeneous_block_specs": False,
    "is_hybrid_model": False,
    "qk_l2_norm": False,
    "seq_len_interpolation_factor": None,
    "mtp_num_layers": None,
}
# Fields that `nemo_model` sets and that do not change what the model is: kernels, training, and lengths.
NOT_THE_MODEL = {
    "gradient_accumulation_fusion", "moe_permute_fusion", "bias_activation_fusion", "moe_grouped_gemm", "seq_length",
    "max_position_embeddings", "moe_aux_loss_coeff", "moe_router_load_balancing_type", "mtp_loss_scaling_factor",
    "vocab_size", "moe_ffn_hidden_size", "yarn_mscale", "yarn_mscale_all_dim", "rope_type", "window_size",
    "window_attn_skip_freq", "kv_channels", "original_max_position_embeddings", "position_embedding_type",
    "rotary_scaling_factor",
}  # fmt: skip


KINDS = (str, int, float, type(None))
LARGEST, MOST_ENTRIES = 1 << 64, 10_000  # of a number, and of a list: there is one for each layer


class Described(Mapping[str, Any]):
    """The fields that a checkpoint's own files say of its model, under NeMo's names.

    Args:
        fields: as the file has them. Functions and dtypes are their names, without the module.
        where: the file.
        rows: of the embedding as stored, which may be padded; for files that do not say the vocabulary.
    """

    def __init__(self, fields: Mapping[str, Any], where: Path, rows: int | None = None) -> None:
        found = {OTHER_NAMES.get(n, n): bounded(value) for n, value in fields.items() if isinstance(n, str)}
        if "untie_embeddings_and_output_weights" in found:
            found["share_embeddings_and_output_weights"] = not found.pop("untie_embeddings_and_output_weights")
        scaling = found.pop("use_rope_scaling", found.pop("rope_scaling", None))
        if scaling is True:
            found = {"scale_factor": 8.0, **LLAMA3, **found}
        elif scaling is False:  # Megatron has the factor's default there too
            found.pop("scale_factor", None)
        if found.get("group_query_attention") is False or found.get("num_query_groups") is None:
            found["num_query_groups"] = found.get("num_attention_heads")
        self._fields, self.where, self.rows = found, where, rows

    def __getitem__(self, name: str) -> Any:
        try:
            return self._fields[name]
        except KeyError:
            raise DataError(f"{self.where} does not say {name}; {GIVE}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or the default where the file has none or has null."""
        found = self._fields.get(name)
        return default if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    @property
    def vocabulary(self) -> int:
        """Tokens; where no file says it, the rows of the embedding."""
        found = self.get("vocab_size") or self.rows
        if not found:
            raise DataError(f"{self.where} does not say vocab_size; {GIVE}")
        return found

    @property
    def length(self) -> int:
        """The longest text: of the model where it is said, else of the run that saved it."""
        return self.get("max_position_embeddings") or self["seq_length"]


def bounded(value: Any) -> Any:
    """The value, if it is of a kind that fields of a model have, else what kind it is of.

    In a few bytes of YAML or of a pickle a list may hold itself, or the same list 2^30 times, and a number may have
    more digits than Python prints.
    """
    if isinstance(value, (list, tuple)):
        plain = len(value) <= MOST_ENTRIES and not any(isinstance(each, (list, tuple, dict, set)) for each in value)
        return [bounded(each) for each in value] if plain else f"{type(value).__name__} of other ones"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "number of more than 64 bits"
    return value if isinstance(value, KINDS) else getattr(value, "target", type(value).__name__)


def decoder_config(f: Described) -> dict[str, Any]:
    """The fields of config.json that every family has."""
    heads = f["num_attention_heads"]
    return {
        "torch_dtype": "bfloat16",
        "num_hidden_layers": f["num_layers"],
        "hidden_size": f["hidden_size"],
        "intermediate_size": f["ffn_hidden_size"],
        "num_attention_heads": heads,
        "num_key_value_heads": f.get("num_query_groups", heads),
        "head_dim": f.get("kv_channels") or f["hidden_size"] // heads,
        "vocab_size": f.vocabulary,
        "hidden_act": "silu",
        "rms_norm_eps": f["layernorm_epsilon"],
        "rope_theta": float(f["rotary_base"]),
        "max_position_embeddings": f.length,
        "tie_word_embeddings": bool(f.get("share_embeddings_and_output_weights", False)),
    }


# ---------------------------------------------------------------------------- is it all said


def check(f: Described, family: Family, config: Config) -> None:
    """DataError for a field whose value the family's config.json does not say."""
    wanted = {**PLAIN, **family.MEGATRON, **family.nemo_model(config)[2]}
    if f.get("window_size") and wanted.get("window_size") is None:
        raise DataError(f"{f.where}: window_size is {f['window_size']!r}, but {config['model_type']} has no windows")
    for name, value in wanted.items():
        if name not in f or name in NOT_THE_MODEL or _plain(f.get(name)) == _plain(value):
            continue
        raise DataError(
            f"{f.where}: {name} is {f.get(name)!r}, but a {config['model_type']} model has {_plain(value)!r}; such a "
            "model cannot be a Hugging Face model of this family"
        )
    for name in sorted(set(f) - set(wanted)):
        if (near := difflib.get_close_matches(name, PLAIN, n=1, cutoff=0.95)) and f.get(name):
            raise DataError(f"{f.where}: unknown field {name}, did you mean {near[0]}?")


def _plain(value: Any) -> Any:
    """A value as it can be compared: the last part of a name, a list for a tuple, and nothing for what is off."""
    if isinstance(target := getattr(value, "target", value), str):
        return re.split(r"[.:]", target)[-1]
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if value is False or value == 0 else float(value) if isinstance(value, (int, float)) else value
