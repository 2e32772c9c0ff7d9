"""Gemma 3, text part: local and global layers, two rope bases, four norms a block."""

import struct
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
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=262_208,
    max_position_embeddings=131_072,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Gemma 3's configuration, that of the text part where there are others."""
    text = fields.mapping("text_config") or fields
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        refuse_unless(text, name)
    refuse_unless(text, "use_bidirectional_attention", False)
    config = parse_shape(
        text, "gemma3", DEFAULTS, act="hidden_activation", gate="gelu_pytorch_tanh"
    )
    return _with_kinds(with_norms(config, fields, text), text, context_max)


def with_norms(config: DecoderConfig, fields: Fields, text: Fields) -> DecoderConfig:
    """What Gemma 2 and 3 have in common; `text` is of the text part, `fields` of the whole."""
    bias = text.bool("attention_bias", False)
    return replace(
        config,
        norm_offset=text.float("norm_offset", 1.0, low=0.0),
        attention_scale=text.float("query_pre_attn_scalar", 256.0) ** -0.5,
        embedding_scale=embedding_scale(config, fields, text),
        qk_norm="heads",
        post_norms=True,
        qkv_bias=bias,
        out_bias=bias,
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )


def embedding_scale(config: DecoderConfig, fields: Fields, text: Fields) -> float:
    """The square root of the width, rounded to the dtype of the weights."""
    return _rounded(config.hidden_size**0.5, _weights_dtype(fields, text))


def _with_kinds(config: DecoderConfig, fields: Fields, context_max: int | None) -> DecoderConfig:
    """Every `sliding_window_pattern`-th layer sees everything and has the long rope base."""
    pattern = fields.int("sliding_window_pattern", 6)
    kinds = layer_kinds(fields, config.num_layers, lambda i: (i + 1) % pattern != 0)
    config = with_windows(config, fields, kinds, fields.optional_int("sliding_window", 4096))
    scalings = scalings_by_kind(fields)
    bases = {
        "full_attention": fields.float("rope_theta", 1_000_000.0),
        "sliding_attention": fields.float("rope_local_base_freq", 10_000.0),
    }
    use = rope_use(config, scalings["full_attention"], scalings["full_attention"], context_max)
    ropes: dict[str, RopeConfig] = {}
    for kind, scaling in scalings.items():
        # transformers looks for it beside the layer types, where nobody writes it.
        refuse_unless(scaling, "truncate", True)
        ropes[kind] = parse_rope(scaling, scaling, use, base=bases[kind])
    layers = tuple(
        replace(layer, rope=ropes[kind]) for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, context_max=use.opened_context, layers=layers)


def _weights_dtype(fields: Fields, text: Fields) -> str:
    """What the weights were saved in; all published ones in bfloat16."""
    for holder in (fields, text):
        for name in ("dtype", "torch_dtype"):
            if holder.has(name):
                return holder.str(name)
    return "bfloat16"


def _rounded(value: float, dtype: str) -> float:
    """Gemma scales embeddings in the dtype of its weights: bfloat16 has 8 significant bits."""
    if dtype == "float32":
        return value
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", value))[0])
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


FAMILY = Family(
    model_types=("gemma3_text", "gemma3"),
    parse=parse,
    names=TensorNames(
        attn_post_norm="post_attention_layernorm",
        ffn_norm="pre_feedforward_layernorm",
        ffn_post_norm="post_feedforward_layernorm",
    ),
    prefixes=(
        ("language_model.model.", "language_model.lm_head"),  # multimodal, transformers 4.50
        ("model.language_model.", "lm_head"),  # since 4.52
        ("language_model.", "lm_head"),
        ("", "lm_head"),
    ),
)
