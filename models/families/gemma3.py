"""Gemma 3, text part: local and global layers, two rope bases, four norms a block."""

import struct
from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields, LayerConfig, RopeConfig
from edgekv.models.families.base import (
    Family,
    TensorNames,
    layer_kinds,
    parse_rope,
    rope_of,
    unsupported,
    with_windows,
)


def parse(fields: Fields) -> DecoderConfig:
    """Gemma 3's configuration, that of the text part where there are others.

    Published files leave out what equals the defaults, and these differ: the text-only ones are of
    the 1B model, the multimodal ones of the 4B model.
    """
    text = fields.mapping("text_config")
    if text is None:
        return _parse_text(fields, num_heads=4, num_kv_heads=1, vocab_size=262_144)
    vocab_size = fields.int("vocab_size", 262_208)
    return _parse_text(text, num_heads=8, num_kv_heads=4, vocab_size=vocab_size)


def _parse_text(
    fields: Fields, *, num_heads: int, num_kv_heads: int, vocab_size: int
) -> DecoderConfig:
    if fields.has("final_logit_softcapping") or fields.has("attn_logit_softcapping"):
        raise unsupported(fields, "logit soft-capping", "Gemma 3 has none")
    hidden_size = fields.int("hidden_size", 1152)
    head_dim = fields.int("head_dim", 256)
    local_base = fields.float("rope_local_base_freq", 10_000.0)
    layer = LayerConfig(
        num_heads=fields.int("num_attention_heads", num_heads),
        num_kv_heads=fields.int("num_key_value_heads", num_kv_heads),
        head_dim=head_dim,
        ffn_size=fields.int("intermediate_size", 6912),
        rope=_rope(fields, "sliding_attention") or RopeConfig(base=local_base),
    )
    num_layers = fields.int("num_hidden_layers", 26, high=1024)
    config = DecoderConfig(
        family="gemma3",
        hidden_size=hidden_size,
        vocab_size=fields.int("vocab_size", vocab_size),
        context_max=fields.int("max_position_embeddings", 32_768),
        layers=(layer,) * num_layers,
        norm_eps=fields.float("rms_norm_eps", 1e-6),
        norm_offset=fields.float("norm_offset", 1.0, low=0.0),
        activation="gelu_tanh",
        attention_scale=fields.float("query_pre_attn_scalar", float(head_dim)) ** -0.5,
        embedding_scale=_to_bfloat16(hidden_size**0.5),
        qk_norm=True,
        post_norms=True,
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )
    return _with_global_layers(config, fields)


def _with_global_layers(config: DecoderConfig, fields: Fields) -> DecoderConfig:
    """Every `sliding_window_pattern`-th layer sees everything and has the long rope base."""
    kinds = layer_kinds(fields, config.num_layers)
    pattern = fields.int("sliding_window_pattern", 6)

    def is_sliding(i: int) -> bool:
        return kinds[i] == "sliding_attention" if kinds else (i + 1) % pattern != 0

    global_base = fields.float("rope_theta", 1_000_000.0)
    rope = _rope(fields, "full_attention") or parse_rope(fields, base=global_base)
    config = with_windows(config, fields.int("sliding_window", 512), is_sliding)
    layers = tuple(
        layer if layer.sliding_window else replace(layer, rope=rope) for layer in config.layers
    )
    return replace(config, layers=layers)


def _rope(fields: Fields, kind: str) -> RopeConfig | None:
    """The rope of one kind of layer where `rope_parameters` tells them apart (newer files)."""
    parameters = fields.mapping("rope_parameters")
    own = None if parameters is None else parameters.mapping(kind)
    bases = {"sliding_attention": 10_000.0, "full_attention": 1_000_000.0}
    return None if own is None else rope_of(own, base=bases[kind])


def _to_bfloat16(value: float) -> float:
    """Gemma was trained with its embedding scale rounded to bfloat16 (8 significant bits)."""
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
)
