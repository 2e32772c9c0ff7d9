"""Ministral 3: Llama's shape with YaRN, whose queries grow with their position."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families import mistral
from edgekv.models.families.base import (
    Defaults,
    Family,
    flat_scaling,
    parse_llama_like,
    tied_head,
    unsupported,
    with_usual_rope,
    with_window_everywhere,
)
from edgekv.models.rope_scaling import original_context

DEFAULTS = Defaults(
    intermediate_size=14_336,
    num_hidden_layers=34,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=131_072,
    max_position_embeddings=262_144,
    rms_norm_eps=1e-5,
)
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16_384,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Ministral 3's configuration."""
    fields = with_usual_rope(fields, _ROPE)
    config = parse_llama_like(fields, "ministral3", DEFAULTS, context_max)
    window = fields.optional_int("sliding_window", None)
    config = with_window_everywhere(config, fields, window)
    scaling = flat_scaling(fields)
    beta = scaling.float("llama_4_scaling_beta", 0.0, low=0.0)
    if not beta:
        return config
    original = original_context(scaling, fields, config.context_max)
    return replace(config, query_growth=(original, beta))


def parse_multimodal(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """The text part of Mistral 3, which is a Mistral or a Ministral 3."""
    text = fields.mapping("text_config")
    if text is None:
        raise unsupported(fields, "a mistral3 without text_config", "fetch its whole configuration")
    kinds = {"mistral": mistral.parse, "ministral3": parse}
    kind = text.str("model_type", "mistral")
    if kind not in kinds:
        raise unsupported(text, f"model_type {kind!r}", "supported: " + ", ".join(kinds))
    return replace(kinds[kind](text, context_max), tied_head=tied_head(fields, text))


_PREFIXES = (
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("", "lm_head"),
)
FAMILY = Family(model_types=("ministral3",), parse=parse)
MULTIMODAL = Family(model_types=("mistral3",), parse=parse_multimodal, prefixes=_PREFIXES)
