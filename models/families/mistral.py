"""Mistral: Llama's shape without biases, with a sliding window."""

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    layer_kinds,
    parse_llama_like,
    with_windows,
)

DEFAULTS = Defaults(
    intermediate_size=14_336,
    num_key_value_heads=8,
    vocab_size=32_000,
    max_position_embeddings=131_072,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Mistral's configuration: 4096 tokens in every layer where it says nothing else.

    Null means no window. With `layer_types` transformers takes the model for a Ministral, whose
    layers differ.
    """
    config = parse_llama_like(fields, "mistral", DEFAULTS, context_max)
    window = fields.optional_int("sliding_window", 4096)
    kinds = layer_kinds(fields, config.num_layers, lambda _: window is not None)
    return with_windows(config, fields, kinds, window)


FAMILY = Family(model_types=("mistral",), parse=parse)
