"""How llama.cpp writes each family into a GGUF file: its keys, its tensors, what goes unsaid.

Sources: llama.cpp's converter (`set_gguf_parameters` of its `conversion` package, and
`modify_tensors` for what it changes in the numbers), its loaders (`load_arch_hparams` in
`src/models/*.cpp`) for what a key that is absent means, and the `gguf` package for names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from edgekv.models import gguf_derived as derived
from edgekv.models.families.names import ExpertNames, TensorNames
from edgekv.models.gguf_derived import Json
from edgekv.models.gguf_keys import Keys

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
_DELTA_NAMES = replace(
    _POST_NAMES,
    delta_in=("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
    delta_conv="ssm_conv1d",
    delta_decay="ssm_a",
    delta_decay_is_rate=True,
    delta_bias="ssm_dt.bias",
    delta_norm="ssm_norm",
    delta_out="ssm_out",
)

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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family's files."""

    model_type: str  # of the family that runs it
    names: TensorNames = _NAMES
    # Fields of a Hugging Face configuration by the keys that they are read from.
    fields: Mapping[str, str] = field(default_factory=lambda: _USUAL)
    fixed: Mapping[str, object] = field(default_factory=dict)  # fields that the keys leave open
    settle: Callable[[Json, Keys], None] = derived.nothing  # the fields that are not keys
    also_read: tuple[str, ...] = ()  # keys that `settle` reads
    # Rows of queries and keys stand so that rotary pairs are side by side (`LlamaModel.permute`).
    side_by_side: bool = False
    tiled_values: bool = False  # of a delta layer's value heads: one of each key head in turn
    rope_freqs_stretch: bool = True  # `ROPE_FREQS` stretches the ropes of all layers

    @property
    def read(self) -> frozenset[str]:
        """All keys that change what is made of the file."""
        return frozenset((*self.fields.values(), *self.also_read))


_GEMMA_FIXED = {"norm_offset": 0.0}  # the converter has added the 1
_PERIODIC = ("attention.sliding_window", "attention.sliding_window_pattern")
_QWEN35 = Architecture(
    model_type="qwen3_5",
    names=_DELTA_NAMES,
    fields=_USUAL | _DELTA,
    settle=derived.delta,
    also_read=("attention.recurrent_layers", "rope.dimension_sections"),
    tiled_values=True,
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        fields=_USUAL
        | {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
        settle=derived.llama,
        side_by_side=True,
    ),
    "mistral3": Architecture(
        model_type="ministral3",
        settle=derived.ministral3,
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
        names=replace(_DELTA_NAMES, delta_in=("attn_qkv", "attn_gate", "ssm_ba")),
        fields=_USUAL | _EXPERTS | _SHARED_EXPERT | _DELTA,
        settle=derived.delta,
        also_read=("attention.recurrent_layers",),
    ),
    "qwen35": _QWEN35,
    "qwen35moe": replace(
        _QWEN35,
        model_type="qwen3_5_moe",
        fields=_USUAL | _EXPERTS | _SHARED_EXPERT | _DELTA,
    ),
    "gemma2": Architecture(
        model_type="gemma2",
        fields=_USUAL
        | {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")},
        fixed=_GEMMA_FIXED,
        settle=derived.gemma2,
        also_read=_PERIODIC,
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        fixed=_GEMMA_FIXED,
        settle=derived.gemma3,
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
        settle=derived.gemma4,
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
        settle=derived.gpt_oss,
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
        settle=derived.latent,
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
        settle=derived.phi3,
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
        settle=derived.granite,
        side_by_side=True,
    ),
    "olmo2": Architecture(model_type="olmo3", settle=derived.olmo2, also_read=_PERIODIC),
    "lfm2": Architecture(
        model_type="lfm2",
        names=replace(_NAMES, final_norm="token_embd_norm"),
        fields=_USUAL
        | {"norm_eps": "attention.layer_norm_rms_epsilon", "conv_L_cache": "shortconv.l_cache"},
        fixed={"block_auto_adjust_ff_dim": False},
        settle=derived.lfm2,
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
        settle=derived.openelm,
    ),
}
