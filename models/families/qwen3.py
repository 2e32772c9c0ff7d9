"""Qwen3 (dense): Llama's shape with a norm on each head's query and key."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Defaults, Family, parse_llama_like, switched_windows

DEFAULTS = Defaults(
    intermediate_size=22_016,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=151_936,
    max_position_embeddings=32_768,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen3's configuration."""
    config = parse_llama_like(fields, "qwen3", DEFAULTS, context_max)
    bias = fields.bool("attention_bias", False)
    return switched_windows(replace(config, qk_norm="heads", qkv_bias=bias, out_bias=bias), fields)


FAMILY = Family(model_types=("qwen3",), parse=parse)
