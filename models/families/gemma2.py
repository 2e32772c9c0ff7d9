"""Gemma 2: windows in every second layer, four norms a block, scores and logits bent by tanh."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families import gemma3
from edgekv.models.families.base import (
    Defaults,
    Family,
    flat_scaling,
    layer_kinds,
    parse_rope,
    parse_shape,
    refuse_unless,
    rope_use,
    with_windows,
)

DEFAULTS = Defaults(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=256_000,
    max_position_embeddings=8192,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Gemma 2's configuration."""
    refuse_unless(fields, "use_bidirectional_attention", False)
    config = parse_shape(
        fields, "gemma2", DEFAULTS, act="hidden_activation", gate="gelu_pytorch_tanh"
    )
    scaling = flat_scaling(fields)
    use = rope_use(config, scaling, fields, context_max)
    rope = parse_rope(scaling, fields, use, base=fields.float("rope_theta", 10_000.0))
    layers = tuple(replace(layer, rope=rope) for layer in config.layers)
    config = gemma3.with_norms(replace(config, layers=layers), fields, fields)
    kinds = layer_kinds(fields, config.num_layers, lambda i: i % 2 == 0)
    config = with_windows(config, fields, kinds, fields.int("sliding_window", 4096))
    return replace(
        config,
        context_max=use.opened_context,
        qk_norm="none",
        attention_softcap=fields.optional_float("attn_logit_softcapping", 50.0),
        logits_softcap=fields.optional_float("final_logit_softcapping", 30.0),
    )


FAMILY = Family(model_types=("gemma2",), parse=parse, names=gemma3.FAMILY.names)
