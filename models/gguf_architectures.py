"""How llama.cpp writes each family into a GGUF file: its keys, its tensors, what goes unsaid.

Sources: llama.cpp's converter (`set_gguf_parameters` of its `conversion` package, and
`modify_tensors` for what it changes in the numbers), its loaders (`load_arch_hparams` in
`src/models/*.cpp`) for what a key that is absent means, and the `gguf` package for names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import brief
from edgekv.models.families.base import ExpertNames, TensorNames
from edgekv.models.gguf_keys import Keys

# A tensor with a factor for each rotary pair's wavelength; longrope has two of them.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"

Json = dict[str, object]  # the fields of a `config.json`

_NAMES = TensorNames(
    embedding="token_embd",
    block="blk.{}.",
    attn_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    out="attn_output",
    attn_post_norm="post_attention_norm",
    ffn_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    ffn_post_norm="post_ffw_norm",
    final_norm="output_norm",
    head="output",
    sinks="attn_sinks.weight",
    experts=ExpertNames(
        router="ffn_gate_inp",
        choice_bias="exp_probs_b.bias",
        each=("ffn_gate.{}", "ffn_up.{}", "ffn_down.{}"),  # before 2024-04
        stacked=("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
        fused=("ffn_gate_up_exps.weight", "ffn_down_exps.weight"),
        shared=("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
        shared_gate="ffn_gate_inp_shexp",
        router_norm="ffn_gate_inp.scale",
        router_scales="ffn_down_exps.scale",
        in_norm="pre_ffw_norm_2",
        beside_norms=("post_ffw_norm_1", "post_ffw_norm_2"),
    ),
    query_down="attn_q_a",
    query_norm="attn_q_a_norm",
    query_up="attn_q_b",
    latent_down="attn_kv_a_mqa",
    latent_norm="attn_kv_a_norm",
    latent_up="attn_kv_b",  # before 2025-04
    latent_keys="attn_k_b",
    latent_values="attn_v_b",
    delta_in=("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
    delta_conv="ssm_conv1d",
    delta_decay="ssm_a",
    delta_decay_is_rate=True,
    delta_bias="ssm_dt.bias",
    delta_norm="ssm_norm",
    delta_out="ssm_out",
    conv_in="shortconv.in_proj",
    conv="shortconv.conv",
    conv_out="shortconv.out_proj",
    per_layer_gate="inp_gate",
    per_layer_out="proj",
    per_layer_norm="post_norm",
    layer_scale="layer_output_scale.weight",
    per_layer_table="per_layer_token_embd",
    per_layer_projection="per_layer_model_proj",
    per_layer_projection_norm="per_layer_proj_norm",
)
# The norm before the MLP is called after where it comes from.
_POST_NAMES = replace(_NAMES, ffn_norm="post_attention_norm")

_USUAL = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
}
_EXPERTS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
_SHARED_EXPERT = {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"}
_DELTA = {
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "linear_key_head_dim": "ssm.state_size",
    "linear_value_head_dim": "ssm.inner_size",
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "partial_rotary_factor": "rope.dimension_count",
}


def _as_is(fields: Json, keys: Keys) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family's files."""

    model_type: str  # of the family that runs it
    names: TensorNames = _NAMES
    # Fields of a Hugging Face configuration by the keys that they are read from.
    fields: Mapping[str, str] = field(default_factory=lambda: _USUAL)
    fixed: Mapping[str, object] = field(default_factory=dict)  # fields that the keys leave open
    settle: Callable[[Json, Keys], None] = _as_is  # what is not one field for one key
    also_read: tuple[str, ...] = ()  # keys that `settle` reads
    # Rows of queries and keys stand so that rotary pairs are side by side (`LlamaModel.permute`).
    side_by_side: bool = False
    tiled_values: bool = False  # of a delta layer's value heads: one of each key head in turn
    rope_freqs_stretch: bool = True  # `ROPE_FREQS` stretches the ropes of all layers

    @property
    def read(self) -> frozenset[str]:
        """All keys that change what is made of the file."""
        return frozenset((*self.fields.values(), *self.also_read))


def _kinds(slides: list[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in slides]


def _rotated_part(keys: Keys) -> float:
    """The part of a head that is rotated, as a family multiplies it and rounds down."""
    rotated = keys.int("rope.dimension_count", keys.head_dim)
    return 1.0 if rotated == keys.head_dim else (rotated + 0.5) / keys.head_dim


def _llama(fields: Json, keys: Keys) -> None:
    if keys.int("expert_count", 0, low=0):
        fields["model_type"] = "mixtral"


def _gemma2(fields: Json, keys: Keys) -> None:
    fields["layer_types"] = _kinds(keys.sliding(2))
    fields["sliding_window"] = keys.int("attention.sliding_window", 4096)
    fields["query_pre_attn_scalar"] = _gemma_scalar(keys, num_layers_27b=46)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields[name] is None:
            del fields[name]  # the family's own counts, as in llama.cpp


def _gemma_scalar(keys: Keys, num_layers_27b: int) -> float:
    """What scores are divided by the root of: in the 27B model alone not a head's size."""
    if keys.num_layers != num_layers_27b:
        return keys.head_dim
    return keys.int("embedding_length") / keys.int("attention.head_count")


def _gemma3(fields: Json, keys: Keys) -> None:
    fields["query_pre_attn_scalar"] = _gemma_scalar(keys, num_layers_27b=62)
    if not keys.get("attention.sliding_window"):
        fields["sliding_window_pattern"] = 1  # every layer sees everything
        return
    fields["sliding_window"] = keys.get("attention.sliding_window")
    fields["rope_local_base_freq"] = keys.get("rope.freq_base_swa", 10_000.0)
    fields["layer_types"] = _kinds(keys.sliding(6))


def _gemma4(fields: Json, keys: Keys) -> None:
    slides = keys.layer_flags("attention.sliding_window_pattern")
    num_shared = keys.int("attention.shared_kv_layers", 0, low=0)
    first_shared = keys.num_layers - num_shared
    # Where values are keys there is no tensor of values.
    own = (i for i in range(max(0, first_shared)) if not slides[i])
    values_are_keys = any(f"blk.{i}.attn_v.weight" not in keys.tensors for i in own)
    widths = keys.layer_ints("feed_forward_length")
    wide = widths[-1] == 2 * widths[0]
    if widths != [widths[0]] * first_shared + [widths[0] * (1 + wide)] * num_shared:
        raise keys.unsupported("feed_forward_length")
    for key, other in (
        ("rope.dimension_count", "attention.key_length"),
        ("rope.dimension_count_swa", "attention.key_length_swa"),
        ("attention.value_length_swa", "attention.key_length_swa"),
    ):
        if keys.has(key) and keys.get(key) != keys.get(other):
            raise keys.unsupported(key)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)}
    fields |= _gemma4_heads(keys, slides, values_are_keys) | {
        "layer_types": _kinds(slides),
        "num_kv_shared_layers": num_shared,
        "intermediate_size": widths[0],
        "use_double_wide_mlp": wide,
        "enable_moe_block": keys.int("expert_count", 0, low=0) > 0,
        "rope_parameters": {"full_attention": _proportional(keys), "sliding_attention": local},
    }


def _gemma4_heads(keys: Keys, slides: list[bool], values_are_keys: bool) -> Json:
    heads = keys.layer_ints("attention.head_count_kv")
    of_kind = dict(zip(slides, heads, strict=True))
    alike = values_are_keys or len(set(heads)) == 1
    if not alike or heads != [of_kind[one] for one in slides]:
        raise keys.unsupported("attention.head_count_kv")
    return {
        "num_key_value_heads": of_kind.get(True, heads[0]),
        "num_global_key_value_heads": of_kind.get(False),
        "attention_k_eq_v": values_are_keys,
    }


def _proportional(keys: Keys) -> Json:
    """The rope of layers that see everything: pairs with a huge factor do not turn."""
    factors = keys.rope_factors.get(ROPE_FREQS)
    if factors is None:
        raise CheckpointCorrupt(f"{keys.source}: tensor {ROPE_FREQS!r} is missing")
    num_turning = sum(factor == 1.0 for factor in factors)
    if any(factor < _STANDS_STILL for factor in factors[num_turning:]):
        raise UnsupportedModel(
            f"{keys.source}: {ROPE_FREQS} {brief(list(factors))} is not supported",
            hint="its factors must be 1, and then 1e30",
        )
    return {
        "rope_type": "proportional",
        "rope_theta": keys.get("rope.freq_base"),
        "partial_rotary_factor": (2 * num_turning + 0.5) / keys.int("attention.key_length"),
    }


_STANDS_STILL = 1e20  # times a wavelength: nothing turns within any context


def _gpt_oss(fields: Json, keys: Keys) -> None:
    fields["layer_types"] = _kinds(keys.sliding(2))
    # As the model is published, which no key says; llama.cpp rounds, as for other models.
    scaling = fields["rope_scaling"] or {"rope_type": "default"}
    assert isinstance(scaling, dict)
    fields["rope_scaling"] = scaling | {"truncate": False}


def _olmo2(fields: Json, keys: Keys) -> None:
    """OLMo 2 and 3; only the latter has windows."""
    if keys.get("attention.sliding_window"):
        fields["layer_types"] = _kinds(keys.sliding(4))
        fields["sliding_window"] = keys.get("attention.sliding_window")
    else:
        fields["layer_types"] = _kinds([False] * keys.num_layers)


def _phi3(fields: Json, keys: Keys) -> None:
    fields["partial_rotary_factor"] = _rotated_part(keys)
    fields["sliding_window"] = keys.get("attention.sliding_window") or None


def _granite(fields: Json, keys: Keys) -> None:
    """A multiplier of 0 is none."""
    for name, usual in (
        ("attention_multiplier", keys.head_dim**-0.5),
        ("embedding_multiplier", 1.0),
        ("residual_multiplier", 1.0),
        ("logits_scaling", 1.0),
    ):
        fields[name] = fields[name] or usual
    if not keys.get("rope.scaling.finetuned", True):  # Granite's way to say that there is no rope
        raise keys.unsupported("rope.scaling.finetuned")


def _ministral3(fields: Json, keys: Keys) -> None:
    growth = keys.float("attention.temperature_scale", 0.0)
    scaling = fields["rope_scaling"]
    if not isinstance(scaling, dict):
        if not growth:
            return
        key = "rope.scaling.original_context_length"
        original = keys.int(key, keys.int("context_length"))
        scaling = {"rope_type": "default", "original_max_position_embeddings": original}
    fields["rope_scaling"] = scaling | {
        "mscale": 1.0,
        "mscale_all_dim": keys.float("rope.scaling.yarn_log_multiplier", 0.0),
        "llama_4_scaling_beta": growth,
    }


def _delta(fields: Json, keys: Keys) -> None:
    """Gated DeltaNet in all layers but every n-th, or as a list says."""
    num_heads, inner = keys.int("ssm.time_step_rank"), keys.int("ssm.inner_size")
    if inner % num_heads:
        raise keys.garbled("ssm.inner_size", f"it must be shared out to {num_heads} heads")
    fields["linear_value_head_dim"] = inner // num_heads
    fields["partial_rotary_factor"] = _rotated_part(keys)
    every = keys.int("full_attention_interval", 4)
    recurrent = [(index + 1) % every != 0 for index in range(keys.num_layers)]
    if keys.has("attention.recurrent_layers"):
        recurrent = keys.layer_flags("attention.recurrent_layers")
    fields["layer_types"] = ["linear_attention" if one else "full_attention" for one in recurrent]


def _latent(fields: Json, keys: Keys) -> None:
    """Latent attention; files from before 2025-04 have no `*_mla` but say the same without."""
    rotated = keys.int("rope.dimension_count")
    key_dim = keys.int("attention.key_length_mla", keys.int("attention.key_length"))
    value_dim = keys.int("attention.value_length_mla", keys.int("attention.value_length"))
    if key_dim <= rotated:
        raise keys.garbled("rope.dimension_count", f"keys have {key_dim} numbers in all")
    fields |= {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_dim - rotated,
        "v_head_dim": value_dim,
        "num_key_value_heads": None,  # the one that is left when keys are latent
        "n_group": fields["n_group"] or 1,
        "topk_group": fields["topk_group"] or 1,
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "first_k_dense_replace": keys.int("leading_dense_block_count", 0, low=0),
    }
    sigmoid = keys.get("expert_gating_func", 0) or (2 if _is_glm(keys) else 1)
    if sigmoid != 2:
        raise keys.unsupported("expert_gating_func")
    scaling, log_mul = fields["rope_scaling"], "rope.scaling.yarn_log_multiplier"
    if isinstance(scaling, dict) and keys.has(log_mul):
        # The converter multiplies by 0.1; that `mscale` is the same it takes for granted.
        fields["rope_scaling"] = scaling | dict.fromkeys(
            ("mscale", "mscale_all_dim"), keys.float(log_mul, 0.0) / 0.1
        )


def _is_glm(keys: Keys) -> bool:
    """GLM-4.7-Flash, whose configuration does not name its sigmoid."""
    return keys.num_layers in (47, 48) and keys.get("vocab_size") == 154_880


def _lfm2(fields: Json, keys: Keys) -> None:
    """Layers without keys and values are short convolutions."""
    heads = keys.layer_ints("attention.head_count_kv")
    if len(set(heads) - {0}) != 1:
        raise keys.unsupported("attention.head_count_kv")
    fields["num_key_value_heads"] = max(heads)
    fields["layer_types"] = ["full_attention" if one else "conv" for one in heads]
    if keys.get("attention.sliding_window"):
        raise keys.unsupported("attention.sliding_window")


def _openelm(fields: Json, keys: Keys) -> None:
    widths, dim = keys.get("feed_forward_length"), fields["model_dim"]
    if not isinstance(widths, list) or not isinstance(dim, int) or dim < 1:
        raise CheckpointCorrupt(f"{keys.source}: openelm.feed_forward_length is missing")
    fields["ffn_multipliers"] = [width / dim for width in widths]


_GEMMA_FIXED = {"norm_offset": 0.0}  # the converter has added the 1
_PERIODIC = ("attention.sliding_window", "attention.sliding_window_pattern")
_QWEN35 = Architecture(
    model_type="qwen3_5",
    names=_POST_NAMES,
    fields=_USUAL | _DELTA,
    settle=_delta,
    also_read=("attention.recurrent_layers", "rope.dimension_sections"),
    tiled_values=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        fields=_USUAL
        | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        settle=_llama,
        side_by_side=True,
    ),
    "mistral3": Architecture(
        model_type="ministral3",
        settle=_ministral3,
        also_read=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
        side_by_side=True,
    ),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen3moe": Architecture(
        model_type="qwen3_moe", fields=_USUAL | _EXPERTS, fixed={"norm_topk_prob": True}
    ),
    "qwen3next": Architecture(
        model_type="qwen3_next",
        names=replace(_POST_NAMES, delta_in=("attn_qkv", "attn_gate", "ssm_ba")),
        fields=_USUAL | _EXPERTS | _SHARED_EXPERT | _DELTA,
        settle=_delta,
        also_read=("attention.recurrent_layers",),
    ),
    "qwen35": _QWEN35,
    "qwen35moe": replace(_QWEN35, fields=_USUAL | _EXPERTS | _SHARED_EXPERT | _DELTA),
    "gemma2": Architecture(
        model_type="gemma2",
        fields=_USUAL
        | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
        fixed=_GEMMA_FIXED,
        settle=_gemma2,
        also_read=_PERIODIC,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        fixed=_GEMMA_FIXED,
        settle=_gemma3,
        also_read=(*_PERIODIC, "rope.freq_base_swa"),
    ),
    "gemma4": Architecture(
        model_type="gemma4_text",
        fields=_USUAL
        | {
            "head_dim": "attention.key_length_swa",
            "global_head_dim": "attention.key_length",
            "sliding_window": "attention.sliding_window",
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "vocab_size_per_layer_input": "vocab_size",
            "final_logit_softcapping": "final_logit_softcapping",
            "num_experts": "expert_count",
            "top_k_experts": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
            "num_kv_shared_layers": "attention.shared_kv_layers",
        },
        settle=_gemma4,
        also_read=(
            "attention.value_length_swa",
            "rope.dimension_count",
            "rope.dimension_count_swa",
            "rope.freq_base_swa",
        ),
        rope_freqs_stretch=False,
    ),
    "gpt-oss": Architecture(
        model_type="gpt_oss",
        names=_POST_NAMES,
        fields=_USUAL
        | {
            "intermediate_size": "expert_feed_forward_length",
            "num_local_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "sliding_window": "attention.sliding_window",
        },
        settle=_gpt_oss,
    ),
    "deepseek2": Architecture(
        model_type="glm4_moe_lite",
        fields=_USUAL
        | {
            "kv_lora_rank": "attention.kv_lora_rank",
            "q_lora_rank": "attention.q_lora_rank",
            "n_routed_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "moe_intermediate_size": "expert_feed_forward_length",
            "n_shared_experts": "expert_shared_count",
            "n_group": "expert_group_count",
            "topk_group": "expert_group_used_count",
            "routed_scaling_factor": "expert_weights_scale",
            "norm_topk_prob": "expert_weights_norm",
            "first_k_dense_replace": "leading_dense_block_count",
            "qk_rope_head_dim": "rope.dimension_count",
            "v_head_dim": "attention.value_length",
        },
        settle=_latent,
        also_read=("expert_gating_func", "rope.scaling.yarn_log_multiplier"),
    ),
    "phi3": Architecture(
        model_type="phi3",
        names=replace(_NAMES, qkv=("attn_qkv",), gate_up=("ffn_up",)),
        fields=_USUAL
        | {
            "partial_rotary_factor": "rope.dimension_count",
            "sliding_window": "attention.sliding_window",
        },
        settle=_phi3,
    ),
    "smollm3": Architecture(model_type="smollm3", side_by_side=True),
    "granite": Architecture(
        model_type="granite",
        fields=_USUAL
        | {
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        settle=_granite,
        side_by_side=True,
    ),
    "olmo2": Architecture(model_type="olmo3", settle=_olmo2, also_read=_PERIODIC),
    "lfm2": Architecture(
        model_type="lfm2",
        names=replace(_NAMES, final_norm="token_embd_norm"),
        fields=_USUAL
        | {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
        fixed={"block_auto_adjust_ff_dim": False},
        settle=_lfm2,
    ),
    "openelm": Architecture(
        model_type="openelm",
        names=replace(_NAMES, qkv=("attn_qkv",)),
        fields={
            "model_dim": "embedding_length",
            "num_transformer_layers": "block_count",
            "num_query_heads": "attention.head_count",
            "num_kv_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "max_context_length": "context_length",
            "rope_freq_constant": "rope.freq_base",
            "vocab_size": "vocab_size",
        },
        fixed={"ffn_dim_divisor": 1},
        settle=_openelm,
    ),
}
