"""Qwen3 with a mixture of experts in most blocks (30B-A3B, Coder-30B)."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, ExpertsConfig, Fields, LayerConfig
from edgekv.models.families.base import (
    Defaults,
    Family,
    expert_counts,
    parse_llama_like,
    with_window_everywhere,
)

DEFAULTS = Defaults(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    num_key_value_heads=4,
    vocab_size=151_936,
    max_position_embeddings=32_768,
)
_EXPERTS = ExpertsConfig(num_experts=128, num_chosen=8, ffn_size=768, normalised=False)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen3-MoE's configuration."""
    config = parse_llama_like(fields, "qwen3_moe", DEFAULTS, context_max)
    bias = fields.bool("attention_bias", False)
    window = None
    if fields.bool("use_sliding_window", False):
        window = fields.optional_int("sliding_window", 4096)
    config = with_window_everywhere(config, fields, window)
    config = replace(config, qk_norm="heads", qkv_bias=bias, out_bias=bias)
    return with_experts(config, fields, read_experts(fields, _EXPERTS))


def read_experts(fields: Fields, usual: ExpertsConfig) -> ExpertsConfig:
    """Qwen's fields of a mixture; `usual` is what those that are absent mean."""
    num_experts, num_chosen = expert_counts(fields, usual.num_experts, usual.num_chosen)
    shared_size = usual.shared_size
    if shared_size:
        shared_size = fields.int("shared_expert_intermediate_size", shared_size)
    return replace(
        usual,
        num_experts=num_experts,
        num_chosen=num_chosen,
        ffn_size=fields.int("moe_intermediate_size", usual.ffn_size),
        normalised=fields.bool("norm_topk_prob", usual.normalised),
        shared_size=shared_size,
    )


def with_experts(config: DecoderConfig, fields: Fields, experts: ExpertsConfig) -> DecoderConfig:
    """Experts in every `decoder_sparse_step`-th block that `mlp_only_layers` does not except."""
    step = fields.int("decoder_sparse_step", 1)
    dense = fields.indices("mlp_only_layers", config.num_layers)

    def layer(index: int, one: LayerConfig) -> LayerConfig:
        if index in dense or (index + 1) % step:
            return one
        return replace(one, ffn_size=0, experts=experts)

    layers = tuple(layer(index, one) for index, one in enumerate(config.layers))
    return replace(config, layers=layers)


FAMILY = Family(model_types=("qwen3_moe",), parse=parse)
