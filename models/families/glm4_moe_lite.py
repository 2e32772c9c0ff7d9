"""GLM-4.7-Flash: latent attention, and sigmoid-routed experts behind the first block."""

import math
from dataclasses import replace

from edgekv.errors import CheckpointCorrupt
from edgekv.models.config import DecoderConfig, ExpertsConfig, Fields, LatentConfig
from edgekv.models.families.base import (
    Defaults,
    Family,
    expert_counts,
    flat_scaling,
    listed_kinds,
    parse_llama_like,
    refuse_unless,
)
from edgekv.models.families.names import ExpertNames, TensorNames

DEFAULTS = Defaults(
    hidden_size=2048,
    intermediate_size=10_240,
    num_hidden_layers=47,
    num_attention_heads=20,
    num_key_value_heads=20,
    vocab_size=154_880,
    max_position_embeddings=202_752,
    rms_norm_eps=1e-5,
)
_KINDS = ("dense", "sparse")  # of MLPs


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """GLM-4.7-Flash's configuration."""
    refuse_unless(fields, "topk_method", "noaux_tc")
    refuse_unless(fields, "scoring_func", "sigmoid")
    refuse_unless(fields, "rope_interleave", True)
    latent = LatentConfig(
        rank=fields.int("kv_lora_rank", 512),
        query_rank=fields.optional_int("q_lora_rank", 768),
        plain_dim=fields.int("qk_nope_head_dim", 192),
        rope_dim=fields.int("qk_rope_head_dim", 64),
        value_dim=fields.int("v_head_dim", 256),
    )
    if latent.query_rank is None:  # they alone would have none
        refuse_unless(fields, "attention_bias", False)
    # transformers takes it for `qk_rope_head_dim`, mlx-lm takes no notice.
    refuse_unless(fields, "head_dim", latent.rope_dim)
    # The rope is that of heads as wide as what is rotated.
    raw = {**fields.raw, "head_dim": latent.rope_dim}
    narrow = Fields(raw, fields.source, fields.names)
    config = parse_llama_like(narrow, "glm4_moe_lite", DEFAULTS, context_max)
    bias = fields.bool("attention_bias", False)
    query_dim = latent.plain_dim + latent.rope_dim
    config = replace(
        config,
        attention_scale=query_dim**-0.5 * _stretched(fields),
        qkv_bias=bias,
        out_bias=bias,
        layers=tuple(
            replace(layer, head_dim=query_dim, num_kv_heads=layer.num_heads, latent=latent)
            for layer in config.layers
        ),
    )
    return _with_experts(config, fields)


def _stretched(fields: Fields) -> float:
    """What YaRN's `mscale_all_dim` makes of scores, which are rotated in part only."""
    scaling = flat_scaling(fields)
    all_dim = scaling.float("mscale_all_dim", 0.0, low=0.0)
    factor = scaling.float("factor", 1.0)
    if not all_dim or factor <= 1:
        return 1.0
    return (0.1 * all_dim * math.log(factor) + 1.0) ** 2


def _with_experts(config: DecoderConfig, fields: Fields) -> DecoderConfig:
    names = ("n_routed_experts", "num_local_experts")
    num_experts, num_chosen = expert_counts(fields, 64, 4, names)
    ffn_size = fields.int("moe_intermediate_size", 1536)
    num_groups = fields.int("n_group", 1, high=num_experts)
    experts = ExpertsConfig(
        num_experts=num_experts,
        num_chosen=num_chosen,
        ffn_size=ffn_size,
        scores="sigmoid",
        normalised=fields.bool("norm_topk_prob", True),
        scale=fields.float("routed_scaling_factor", 1.8),
        num_groups=num_groups,
        num_groups_chosen=fields.int("topk_group", 1, high=num_groups),
        choice_bias=True,
        shared_size=ffn_size * (fields.optional_int("n_shared_experts", 1) or 0),
    )
    _check_groups(fields, experts)
    layers = tuple(
        replace(layer, ffn_size=0, experts=experts) if kind == "sparse" else layer
        for layer, kind in zip(config.layers, _kinds(fields, config.num_layers), strict=True)
    )
    return replace(config, layers=layers)


def _check_groups(fields: Fields, experts: ExpertsConfig) -> None:
    """A group is as good as its best two, and those chosen must have experts enough."""
    size, rest = divmod(experts.num_experts, experts.num_groups)
    if rest or (experts.num_groups > 1 and size < 2):
        hint = f"{experts.num_experts} experts must come in equal groups of two or more"
        raise CheckpointCorrupt(f"{fields.source}: n_group is {experts.num_groups}", hint=hint)
    if experts.num_chosen > size * experts.num_groups_chosen:
        hint = f"topk_group {experts.num_groups_chosen} leaves fewer experts to choose from"
        chosen = f"{fields.source}: num_experts_per_tok is {experts.num_chosen}"
        raise CheckpointCorrupt(chosen, hint=hint)


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    """Which blocks have experts; older files say from which one on."""
    first, every = fields.int("first_k_dense_replace", 1, low=0), fields.int("moe_layer_freq", 1)
    usual = [_KINDS[i >= first and i % every == 0] for i in range(num_layers)]
    return listed_kinds(fields, "mlp_layer_types", usual, _KINDS)


FAMILY = Family(
    model_types=("glm4_moe_lite",),
    parse=parse,
    names=TensorNames(
        experts=ExpertNames(
            shared=tuple(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down"))
        )
    ),
)
