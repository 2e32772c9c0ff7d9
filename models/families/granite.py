"""Granite: Llama's shape with a multiplier wherever there can be one."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Defaults, Family, parse_llama_like

DEFAULTS = Defaults(
    intermediate_size=11_008,
    num_key_value_heads=None,
    vocab_size=32_000,
    max_position_embeddings=2048,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Granite's configuration."""
    config = parse_llama_like(fields, "granite", DEFAULTS, context_max)
    bias = fields.bool("attention_bias", False)
    return replace(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.bool("mlp_bias", False),
        embedding_scale=fields.float("embedding_multiplier", 1.0),
        attention_scale=fields.float("attention_multiplier", 1.0),
        residual_scale=fields.float("residual_multiplier", 1.0),
        logits_scale=1 / fields.float("logits_scaling", 1.0),
    )


FAMILY = Family(model_types=("granite",), parse=parse)
