"""Phi-3 and Phi-4: Llama's shape with fused projections, heads rotated in part."""

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    flat_scaling,
    parse_llama_like,
    with_window_everywhere,
)
from edgekv.models.families.names import TensorNames

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
    return with_window_everywhere(config, fields, fields.optional_int("sliding_window", None))


def _renamed(fields: Fields) -> Fields:
    """Older files call longrope "su" or "yarn", and some do not say the original context."""
    raw = {"original_max_position_embeddings": 4096, **fields.raw}
    scaling = flat_scaling(fields)
    if scaling.raw.get("rope_type", scaling.raw.get("type")) in ("su", "yarn"):
        raw["rope_scaling"] = {**scaling.raw, "rope_type": "longrope"}
    return Fields(raw, fields.source, fields.names)


FAMILY = Family(
    model_types=("phi3",),
    parse=parse,
    names=TensorNames(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",)),
)
