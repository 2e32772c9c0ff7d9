"""Qwen3 with a mixture of experts in most blocks (30B-A3B, Coder-30B)."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, ExpertsConfig, Fields, LayerConfig
from edgekv.models.families.base import Defaults, Family, parse_llama_like, switched_windows

DEFAULTS = Defaults(
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=24,
    num_key_value_heads=4,
    head_dim=None,
    vocab_size=151_936,
    max_position_embeddings=32_768,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen3-MoE's configuration."""
    config = parse_llama_like(fields, "qwen3_moe", DEFAULTS, context_max)
    bias = fields.bool("attention_bias", False)
    config = replace(config, qk_norm="heads", qkv_bias=bias, out_bias=bias)
    return with_experts(switched_windows(config, fields), fields, read_experts(fields))


def read_experts(
    fields: Fields, *, normalised: bool = False, shared: bool = False
) -> ExpertsConfig:
    """Qwen's fields of a mixture; `shared`: with the expert that all rows go through."""
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    num_experts = fields.int(name, 512 if shared else 128, high=4096)
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=fields.int("num_experts_per_tok", 8, high=num_experts),
        ffn_size=fields.int("moe_intermediate_size", 512 if shared else 768),
        normalised=fields.bool("norm_topk_prob", normalised),
        shared_size=fields.int("shared_expert_intermediate_size", 512) if shared else 0,
        shared_gate=shared,
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
