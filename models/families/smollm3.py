"""SmolLM3: Llama's shape, in which every fourth layer knows no positions."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    layer_kinds,
    parse_llama_like,
    with_windows,
)

DEFAULTS = Defaults(
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    vocab_size=128_256,
    max_position_embeddings=32_768,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """SmolLM3's configuration; windows, if it has any, are of the layers without positions."""
    config = parse_llama_like(fields, "smollm3", DEFAULTS, context_max, base=2_000_000.0)
    bias = fields.bool("attention_bias", False)
    interval = fields.int("no_rope_layer_interval", 4)
    usual = [int((i + 1) % interval != 0) for i in range(config.num_layers)]
    rotated = fields.flags("no_rope_layers", usual)
    window = None
    if fields.bool("use_sliding_window", False):
        window = fields.optional_int("sliding_window", None)
    kinds = layer_kinds(fields, config.num_layers, lambda i: window is not None and not rotated[i])
    config = with_windows(config, fields, kinds, window)
    return replace(
        config,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=fields.bool("mlp_bias", False),
        layers=tuple(
            layer if is_rotated else replace(layer, rope=None)
            for layer, is_rotated in zip(config.layers, rotated, strict=True)
        ),
    )


FAMILY = Family(model_types=("smollm3",), parse=parse)
