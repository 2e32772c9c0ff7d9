"""Llama 2 and 3.x, SmolLM2, Mistral and everything else of their shape."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Family, layer_kinds, parse_llama_like, with_windows


def parse(fields: Fields) -> DecoderConfig:
    """Llama's configuration; Mistral's sliding window applies to every layer."""
    config = parse_llama_like(fields, family="llama")
    config = replace(
        config,
        qkv_bias=fields.bool("attention_bias", False),
        out_bias=fields.bool("attention_bias", False),
        mlp_bias=fields.bool("mlp_bias", False),
    )
    if not fields.has("sliding_window"):
        return config
    kinds = layer_kinds(fields, config.num_layers)
    window = fields.int("sliding_window")
    return with_windows(config, window, lambda i: kinds is None or kinds[i] == "sliding_attention")


FAMILY = Family(model_types=("llama", "mistral"), parse=parse)
