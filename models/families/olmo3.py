"""OLMo 3: norms behind attention and MLP, those of heads over all of them, windows."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families.base import (
    Defaults,
    Family,
    layer_kinds,
    parse_rope,
    parse_shape,
    refuse_unless,
    rope_use,
    scalings_by_kind,
    with_windows,
)
from edgekv.models.families.names import TensorNames

DEFAULTS = Defaults(
    intermediate_size=11_008,
    num_key_value_heads=None,
    vocab_size=50_304,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
)
_BASE = 500_000.0


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """OLMo 3's configuration: only layers that see everything have their rope stretched."""
    config = parse_shape(fields, "olmo3", DEFAULTS)
    kinds = layer_kinds(fields, config.num_layers, lambda i: (i + 1) % 4 != 0)
    config = with_windows(config, fields, kinds, fields.int("sliding_window", 4096))
    scalings = scalings_by_kind(fields)
    if not scalings["sliding_attention"].has("rope_theta"):
        # transformers reads it for the layers that see everything alone, mlx-lm for all.
        refuse_unless(fields, "rope_theta", _BASE)
    base = fields.float("rope_theta", _BASE)
    use = rope_use(config, scalings["full_attention"], fields, context_max)
    ropes: dict[str, RopeConfig] = {
        kind: parse_rope(scaling, fields, use, base=base) for kind, scaling in scalings.items()
    }
    bias = fields.bool("attention_bias", False)
    return replace(
        config,
        context_max=use.opened_context,
        qk_norm="whole",
        pre_norms=False,
        post_norms=True,
        qkv_bias=bias,
        out_bias=bias,
        layers=tuple(
            replace(layer, rope=ropes[kind])
            for layer, kind in zip(config.layers, kinds, strict=True)
        ),
    )


FAMILY = Family(
    model_types=("olmo3",),
    parse=parse,
    names=TensorNames(
        attn_post_norm="post_attention_layernorm", ffn_post_norm="post_feedforward_layernorm"
    ),
)
