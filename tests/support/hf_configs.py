"""What transformers makes of a configuration, and what edgekv does, in the same words.

assert ours("qwen3_moe", raw) == theirs("qwen3_moe", raw)
"""

import math
from collections.abc import Sequence
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

from edgekv.models.config import DecoderConfig, Fields, LayerConfig, RopeConfig
from edgekv.models.families import parse_config

CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "ministral3": "Ministral3Config",
    "mixtral": "MixtralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
    "qwen3_5_text": "Qwen3_5TextConfig",
    "qwen3_5_moe_text": "Qwen3_5MoeTextConfig",
    "qwen3_next": "Qwen3NextConfig",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "gemma4_text": "Gemma4TextConfig",
    "gpt_oss": "GptOssConfig",
    "glm4_moe_lite": "Glm4MoeLiteConfig",
    "phi3": "Phi3Config",
    "smollm3": "SmolLM3Config",
    "granite": "GraniteConfig",
    "olmo3": "Olmo3Config",
    "lfm2": "Lfm2Config",
}
# Whose network goes by `layer_types`; of others all layers have the window or none.
_KINDS = (
    *("qwen2", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "smollm3", "olmo3"),
    *("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "lfm2"),
)
_RECURRENT = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")
_GEMMAS = ("gemma2", "gemma3_text", "gemma4_text")
# Whose attention has biases: always, never, or as `attention_bias` says.
_NEVER_BIASED = ("mistral", "ministral3", "mixtral", "phi3", "lfm2")
_MLP_BIASED = ("llama", "smollm3", "granite")
_WINDOWS = {"llama": None, "granite": None, "glm4_moe_lite": None}  # what their networks have

Words = dict[str, Any]
REFUSALS = (StrictDataclassError, AttributeError, KeyError, TypeError)


def theirs(model_type: str, raw: Words) -> Words:
    """What transformers' own class and network make of a configuration.

    Raises:
        REFUSALS: transformers does not take it, or its network would fail.
    """
    name = CLASSES[model_type]
    if model_type == "mistral" and "layer_types" in raw:  # so does AutoConfig
        name = "MinistralConfig"
    config = getattr(transformers, name)(**copied(raw))
    config.standardize_rope_params()  # as its network does
    kinds = _their_kinds(model_type, config)
    layers = [config.per_layer_config[i] for i in range(config.num_hidden_layers)]
    window = _WINDOWS.get(model_type, getattr(config, "sliding_window", None))
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "heads": [_their_heads(model_type, layer) for layer in layers],
        "mixers": [_their_mixer(model_type, config, kind) for kind in kinds],
        "mlps": _their_mlps(model_type, config),
        "gelu": "gelu" in _their_activation(model_type, config),
        "norm_eps": config.norm_eps if model_type == "lfm2" else config.rms_norm_eps,
        "scale": _their_scale(model_type, config, layers[0]),
        "biases": _their_biases(model_type, config),
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        "ropes": [_their_rope(model_type, config, i, kind) for i, kind in enumerate(kinds)],
        "context": _their_context(config, config.rope_parameters),
        "shared": _their_sharing(model_type, config, kinds),
        "multipliers": _their_multipliers(model_type, config),
        "grown": _their_growth(model_type, config),
        "per_layer": _their_table(model_type, config),
    }


def ours(model_type: str, raw: Words) -> Words:
    """What edgekv makes of it."""
    config = parsed(model_type, raw)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "heads": [(x.num_heads, x.num_kv_heads, x.head_dim) for x in config.layers],
        "mixers": [_our_mixer(layer) for layer in config.layers],
        "mlps": [_our_mlp(layer) for layer in config.layers],
        "gelu": config.activation == "gelu_tanh",
        "norm_eps": config.norm_eps,
        "scale": config.attention_scale,
        "biases": (config.qkv_bias, config.out_bias, config.mlp_bias),
        "windows": [layer.sliding_window for layer in config.layers],
        "ropes": [_our_rope(layer) for layer in config.layers],
        "context": config.context_max,
        "shared": [(layer.kv_from, layer.values_are_keys) for layer in config.layers],
        "multipliers": (
            1.0 if config.family.startswith("gemma") else config.embedding_scale,
            config.residual_scale,
            config.logits_scale,
            config.attention_softcap,
            config.logits_softcap,
        ),
        "grown": config.query_growth,
        "per_layer": config.per_layer and (config.per_layer.size, config.per_layer.vocab_size),
    }


def parsed(model_type: str, raw: Words) -> DecoderConfig:
    """The configuration as edgekv reads it."""
    return parse_config(Fields({"model_type": model_type, **raw}, "config.json"))


def copied(value: Any) -> Any:
    """A deep copy: transformers' classes write into what they are given."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


# --- transformers', as its networks read their configurations ---


def _their_kinds(model_type: str, config: Any) -> Sequence[str]:
    if model_type in _KINDS or type(config).__name__ == "MinistralConfig":
        return config.layer_types
    window = _WINDOWS.get(model_type, getattr(config, "sliding_window", None))
    kind = "full_attention" if window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _their_heads(model_type: str, layer: Any) -> tuple[int, int, int]:
    heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
    if model_type == "glm4_moe_lite":
        return heads, heads, layer.qk_nope_head_dim + layer.qk_rope_head_dim
    return heads, kv_heads, getattr(layer, "head_dim", None) or layer.hidden_size // heads


def _their_activation(model_type: str, config: Any) -> str:
    if model_type in ("gpt_oss", "lfm2"):  # whatever their configurations say
        return "silu"
    return config.hidden_activation if model_type in _GEMMAS else config.hidden_act


def _their_mixer(model_type: str, config: Any, kind: str) -> tuple[Any, ...]:
    if kind == "linear_attention":
        return (
            "delta",
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
        )
    if kind == "conv":
        return ("conv", config.conv_L_cache, config.conv_bias)
    if model_type == "glm4_moe_lite":
        return (
            "latent",
            config.kv_lora_rank,
            config.q_lora_rank,
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
    return ("heads",)


def _their_mlps(model_type: str, config: Any) -> list[tuple[Any, ...]]:
    """Of each block the dense MLP's width and the experts."""
    n = config.num_hidden_layers
    if model_type == "gemma4_text":
        experts = None
        if config.enable_moe_block:
            experts = (config.num_experts, config.top_k_experts, config.moe_intermediate_size)
            experts = (*experts, True, 1.0, 1, 1, 0)
        wide = [config.use_double_wide_mlp and mode == "reuse" for mode in config.kv_sharing_modes]
        return [(config.intermediate_size * (2 if w else 1), experts) for w in wide]
    if model_type == "lfm2":
        return [(_their_adjusted_width(config), None)] * n
    if model_type in ("qwen3_moe", "qwen3_next"):
        sparse = [
            i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0
            for i in range(n)
        ]
    elif model_type == "glm4_moe_lite":
        sparse = [kind == "sparse" for kind in config.mlp_layer_types]
    else:
        sparse = [model_type in ("mixtral", "gpt_oss", "qwen3_5_moe_text")] * n
    return [
        (0, _their_experts(model_type, config)) if one else (config.intermediate_size, None)
        for one in sparse
    ]


def _their_adjusted_width(config: Any) -> int:
    width = config.intermediate_size
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(config.block_ffn_dim_multiplier * int(2 * width / 3))
    return math.ceil(width / config.block_multiple_of) * config.block_multiple_of


def _their_experts(model_type: str, config: Any) -> tuple[Any, ...]:
    """Their number, how many of a row, width, normalised, scale, groups, groups chosen, shared."""
    normalised = model_type not in ("qwen3_moe", "qwen3_next") or config.norm_topk_prob
    own = model_type not in ("mixtral", "gpt_oss")
    size = config.moe_intermediate_size if own else config.intermediate_size
    chosen = config.num_experts_per_tok
    if model_type == "glm4_moe_lite":
        routed = (config.norm_topk_prob, config.routed_scaling_factor, config.n_group)
        shared = size * config.n_shared_experts
        return (config.n_routed_experts, chosen, size, *routed, config.topk_group, shared)
    shared = config.shared_expert_intermediate_size if model_type in _RECURRENT else 0
    mapped = hasattr(config, "num_local_experts")
    num_experts = config.num_local_experts if mapped else config.num_experts
    return (num_experts, chosen, size, normalised, 1.0, 1, 1, shared)


def _their_scale(model_type: str, config: Any, layer: Any) -> float:
    if model_type == "granite":
        return config.attention_multiplier
    if model_type == "gemma4_text":
        return 1.0
    if model_type in _GEMMAS:
        return config.query_pre_attn_scalar**-0.5
    scale = _their_heads(model_type, layer)[2] ** -0.5
    rope = config.rope_parameters
    if model_type != "glm4_moe_lite" or rope["rope_type"] == "default":
        return scale
    all_dim, factor = rope.get("mscale_all_dim", 0), rope["factor"]
    return scale * (0.1 * all_dim * math.log(factor) + 1) ** 2 if all_dim else scale


def _their_biases(model_type: str, config: Any) -> tuple[bool, bool, bool]:
    mlp_biased = model_type in _MLP_BIASED and config.mlp_bias
    if model_type == "qwen2":
        return True, False, mlp_biased
    biased = model_type not in _NEVER_BIASED and config.attention_bias
    return biased, biased, mlp_biased


def _their_rope(model_type: str, config: Any, index: int, kind: str) -> tuple[Any, ...] | None:
    """Base, longest wavelength's factor, and how much of a head is rotated."""
    if kind in ("linear_attention", "conv") or (
        model_type == "smollm3" and not config.no_rope_layers[index]
    ):
        return None
    rope = config.rope_parameters.get(kind, config.rope_parameters)
    head_dim = _their_heads(model_type, config.per_layer_config[index])[2]
    if rope["rope_theta"] is None:
        raise TypeError("a rope without a base")
    dim, factor = head_dim, None
    if model_type in ("phi3", *_RECURRENT):
        dim = int(head_dim * rope["partial_rotary_factor"])
    elif model_type == "glm4_moe_lite":
        dim = config.qk_rope_head_dim
    match rope["rope_type"]:
        case "linear" | "yarn":
            factor = rope["factor"]
        case "proportional":
            turned = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
            factor = 1.0 if turned == head_dim // 2 else math.inf
        case "longrope":
            long = config.max_position_embeddings > rope["original_max_position_embeddings"]
            factor = max(rope["long_factor" if long else "short_factor"])
    return rope["rope_theta"], factor, dim


def _their_context(config: Any, parameters: Words) -> int:
    parameters = parameters.get("full_attention", parameters)
    if parameters.get("rope_type") != "yarn":
        return config.max_position_embeddings
    stretched = int(parameters["factor"] * parameters["original_max_position_embeddings"])
    return max(config.max_position_embeddings, stretched)


def _their_sharing(model_type: str, config: Any, kinds: Sequence[str]) -> list[tuple[Any, bool]]:
    if model_type != "gemma4_text":
        return [(None, False)] * len(kinds)
    modes = config.kv_sharing_modes
    sources = {kind: i for i, kind in enumerate(kinds) if modes[i] != "reuse"}  # the last counts
    alike = [config.attention_k_eq_v and kind == "full_attention" for kind in kinds]
    return [
        (sources[kind] if mode == "reuse" else None, same)
        for kind, mode, same in zip(kinds, modes, alike, strict=True)
    ]


def _their_multipliers(model_type: str, config: Any) -> tuple[Any, ...]:
    """Of embeddings, what blocks add, logits, and two soft caps; Gemma's embeddings left out."""
    plain = (1.0, 1.0, 1.0)
    if model_type == "granite":
        plain = (config.embedding_multiplier, config.residual_multiplier, 1 / config.logits_scaling)
    cap = getattr(config, "attn_logit_softcapping", None) if model_type == "gemma2" else None
    capped = model_type in ("gemma2", "gemma4_text")
    return (*plain, cap, config.final_logit_softcapping if capped else None)


def _their_growth(model_type: str, config: Any) -> tuple[int, float] | None:
    rope = config.rope_parameters
    if model_type != "ministral3" or not rope.get("llama_4_scaling_beta"):
        return None
    return rope["original_max_position_embeddings"], rope["llama_4_scaling_beta"]


def _their_table(model_type: str, config: Any) -> tuple[int, int] | None:
    if model_type != "gemma4_text" or not config.hidden_size_per_layer_input:
        return None
    return config.hidden_size_per_layer_input, config.vocab_size_per_layer_input


# --- ours ---


def _our_mixer(layer: LayerConfig) -> tuple[Any, ...]:
    if (d := layer.delta) is not None:
        heads = (d.num_key_heads, d.num_value_heads)
        return ("delta", *heads, d.key_dim, d.value_dim, d.conv_size)
    if (m := layer.latent) is not None:
        return ("latent", m.rank, m.query_rank, m.plain_dim, m.rope_dim, m.value_dim)
    if layer.conv is not None:
        return ("conv", layer.conv.size, layer.conv.bias)
    return ("heads",)


def _our_mlp(layer: LayerConfig) -> tuple[Any, ...]:
    if (e := layer.experts) is None:
        return layer.ffn_size, None
    sizes = (e.num_experts, e.num_chosen, e.ffn_size)
    weights = (e.normalised, e.scale, e.num_groups, e.num_groups_chosen)
    return layer.ffn_size, (*sizes, *weights, e.shared_size)


def _our_rope(layer: LayerConfig) -> tuple[Any, ...] | None:
    rope: RopeConfig | None = layer.rope
    if rope is None or layer.recurrent:
        return None
    head_dim = layer.head_dim if layer.latent is None else layer.latent.rope_dim
    factor = max(rope.wavelength_factors) if rope.wavelength_factors else None
    return rope.base, factor, rope.rotated or head_dim
