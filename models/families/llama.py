"""Llama 2 and 3.x, SmolLM2 and everything else of their shape."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields, brief
from edgekv.models.families.base import (
    Defaults,
    Family,
    layer_kinds,
    parse_llama_like,
    unsupported,
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
    kinds = layer_kinds(fields, config.num_layers, lambda _: False)
    if "sliding_attention" in kinds:
        raise unsupported(
            fields, f"layer_types {brief(kinds)} of a llama", "it must be full_attention"
        )
    bias = fields.bool("attention_bias", False)
    return replace(config, qkv_bias=bias, out_bias=bias, mlp_bias=fields.bool("mlp_bias", False))


FAMILY = Family(model_types=("llama",), parse=parse)
