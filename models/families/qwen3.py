"""Qwen3 (dense): Llama's shape with a norm on each head's query and key."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Family, parse_llama_like


def parse(fields: Fields) -> DecoderConfig:
    """Qwen3's configuration."""
    config = parse_llama_like(fields, family="qwen3", rope_base=1_000_000.0)
    bias = fields.bool("attention_bias", False)
    return replace(config, qk_norm=True, qkv_bias=bias, out_bias=bias)


FAMILY = Family(model_types=("qwen3",), parse=parse)
