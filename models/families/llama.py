"""Llama 2 and 3.x, SmolLM2 and everything else of their shape."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    parse_llama_like,
    with_window_everywhere,
)

DEFAULTS = Defaults(
    intermediate_size=11_008,
    num_key_value_heads=None,
    vocab_size=32_000,
    max_position_embeddings=2048,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Llama's configuration.

    A `sliding_window` means nothing here: transformers' Llama sees everything. mlx-lm's has windows
    where `layer_types` says so; what two runtimes read differently is refused.
    """
    config = parse_llama_like(fields, "llama", DEFAULTS, context_max)
    config = with_window_everywhere(config, fields, None)
    bias = fields.bool("attention_bias", False)
    return replace(config, qkv_bias=bias, out_bias=bias, mlp_bias=fields.bool("mlp_bias", False))


FAMILY = Family(model_types=("llama",), parse=parse)
