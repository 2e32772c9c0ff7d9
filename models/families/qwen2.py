"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Defaults, Family, parse_llama_like, switched_windows

DEFAULTS = Defaults(
    intermediate_size=22_016,
    num_key_value_heads=32,
    vocab_size=151_936,
    max_position_embeddings=32_768,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen2's configuration."""
    config = parse_llama_like(fields, "qwen2", DEFAULTS, context_max)
    return switched_windows(replace(config, qkv_bias=True), fields)


FAMILY = Family(model_types=("qwen2",), parse=parse)
