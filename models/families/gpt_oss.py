"""gpt-oss: sinks, a window in every second layer, clamped experts with biases, YaRN."""

from dataclasses import replace

from edgekv.models.config import CLAMP, CLAMP_SLOPE, DecoderConfig, ExpertsConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    expert_counts,
    layer_kinds,
    parse_llama_like,
    refuse_unless,
    with_usual_rope,
    with_windows,
)
from edgekv.models.families.names import ExpertNames, TensorNames

DEFAULTS = Defaults(
    hidden_size=2880,
    intermediate_size=2880,
    num_hidden_layers=36,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=201_088,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
)
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """gpt-oss's configuration."""
    refuse_unless(fields, "swiglu_alpha", CLAMP_SLOPE)
    refuse_unless(fields, "swiglu_limit", CLAMP)
    scaled = with_usual_rope(fields, _YARN)
    config = parse_llama_like(scaled, "gpt_oss", DEFAULTS, context_max, base=150_000.0)
    kinds = layer_kinds(fields, config.num_layers, lambda i: i % 2 == 0)
    config = with_windows(config, fields, kinds, fields.int("sliding_window", 128))
    num_experts, num_chosen = expert_counts(fields, 128, 4)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        ffn_size=config.layers[0].ffn_size,
        router_bias=True,
        bias=True,
    )
    bias = fields.bool("attention_bias", True)
    return replace(
        config,
        activation="clamped_silu",
        sinks=True,
        qkv_bias=bias,
        out_bias=bias,
        layers=tuple(replace(layer, ffn_size=0, experts=experts) for layer in config.layers),
    )


FAMILY = Family(
    model_types=("gpt_oss",),
    parse=parse,
    names=TensorNames(
        experts=ExpertNames(
            router="mlp.router",
            stacked=tuple(f"mlp.experts.{part}_proj" for part in ("gate", "up", "down")),
            fused_in_first=True,
            by_turns=True,
        )
    ),
)
