"""Qwen2 and Qwen2.5: Llama's shape with biases on query, key and value."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import Family, layer_kinds, parse_llama_like, with_windows


def parse(fields: Fields) -> DecoderConfig:
    """Qwen2's configuration; a sliding window counts only where `use_sliding_window` is set."""
    config = parse_llama_like(fields, family="qwen2", rope_base=1_000_000.0)
    config = replace(config, qkv_bias=True)
    if not fields.bool("use_sliding_window", False) or not fields.has("sliding_window"):
        return config
    kinds = layer_kinds(fields, config.num_layers)
    first = fields.int("max_window_layers", config.num_layers, low=0)
    return with_windows(
        config,
        fields.int("sliding_window"),
        lambda i: kinds[i] == "sliding_attention" if kinds else i >= first,
    )


FAMILY = Family(model_types=("qwen2",), parse=parse)
