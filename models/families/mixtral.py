"""Mixtral: Mistral's attention, and in every block a mixture of experts in the MLP's place."""

from dataclasses import replace

from edgekv.models.config import DecoderConfig, ExpertsConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    expert_counts,
    parse_llama_like,
    with_window_everywhere,
)
from edgekv.models.families.names import ExpertNames, TensorNames

DEFAULTS = Defaults(
    intermediate_size=14_336,
    num_key_value_heads=8,
    vocab_size=32_000,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
)


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Mixtral's configuration."""
    config = parse_llama_like(fields, "mixtral", DEFAULTS, context_max, base=1_000_000.0)
    window = fields.optional_int("sliding_window", None)
    config = with_window_everywhere(config, fields, window)
    num_experts, num_chosen = expert_counts(fields, 8, 2)
    experts = ExpertsConfig(
        num_experts=num_experts, num_chosen=num_chosen, ffn_size=config.layers[0].ffn_size
    )
    layers = tuple(replace(layer, ffn_size=0, experts=experts) for layer in config.layers)
    return replace(config, layers=layers)


FAMILY = Family(
    model_types=("mixtral",),
    parse=parse,
    names=TensorNames(
        experts=ExpertNames(
            router="block_sparse_moe.gate",
            each=tuple(f"block_sparse_moe.experts.{{}}.{part}" for part in ("w1", "w3", "w2")),
            stacked=tuple(
                f"block_sparse_moe.switch_mlp.{part}_proj" for part in ("gate", "up", "down")
            ),
        )
    ),
)
