"""Phi-3 and Phi-4: Llama's shape with fused projections, heads rotated in part."""

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    TensorNames,
    layer_kinds,
    parse_llama_like,
    with_windows,
)

DEFAULTS = Defaults(
    hidden_size=3072,
    intermediate_size=8192,
    num_key_value_heads=None,
    vocab_size=32_064,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Phi-3's configuration."""
    renamed = _renamed(fields)
    config = parse_llama_like(renamed, "phi3", DEFAULTS, context_max, rotated=1.0)
    window = fields.optional_int("sliding_window", None)
    kinds = layer_kinds(fields, config.num_layers, lambda _: window is not None)
    return with_windows(config, fields, kinds, window)


def _renamed(fields: Fields) -> Fields:
    """Older files call longrope "su", as transformers' class does away with."""
    scaling = fields.mapping("rope_scaling")
    if scaling is None or scaling.raw.get("type", scaling.raw.get("rope_type")) != "su":
        return fields
    raw = {**scaling.raw, "type": "longrope", "rope_type": "longrope"}
    return Fields({**fields.raw, "rope_scaling": raw}, fields.source, fields.names)


FAMILY = Family(
    model_types=("phi3",),
    parse=parse,
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)
