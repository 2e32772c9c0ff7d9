"""LFM2: attention in a few layers, a gated short convolution in place of it in the others."""

from dataclasses import replace

from edgekv.models.config import ConvConfig, DecoderConfig, Fields, brief
from edgekv.models.families.base import (
    Defaults,
    Family,
    listed_kinds,
    parse_llama_like,
    refuse_unless,
    unsupported,
)
from edgekv.models.families.names import TensorNames

DEFAULTS = Defaults(
    hidden_size=2560,
    intermediate_size=12_288,
    num_key_value_heads=8,
    vocab_size=65_536,
    max_position_embeddings=128_000,
)
_KINDS = ("full_attention", "conv")


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """LFM2's configuration."""
    # What older files call fields that other families have.
    ffn_size = fields.int("block_ff_dim", fields.int("intermediate_size", 12_288))
    tied = fields.bool("tie_embedding", fields.bool("tie_word_embeddings", True))
    own = {"rope_theta": fields.float("rope_theta", 1e6), "head_dim": None, "hidden_act": "silu"}
    shape = Fields({**fields.raw, **own}, fields.source, fields.names)
    config = parse_llama_like(shape, "lfm2", DEFAULTS, context_max)
    refuse_unless(fields, "head_dim", config.layers[0].head_dim)  # mlx-lm takes no notice of it
    conv = ConvConfig(
        size=fields.int("conv_L_cache", 3, low=2, high=256),
        num_channels=config.hidden_size,
        bias=fields.bool("conv_bias", False),
    )
    ffn_size = _adjusted(fields, ffn_size)
    layers = tuple(
        replace(layer, ffn_size=ffn_size, conv=conv if kind == "conv" else None)
        for layer, kind in zip(config.layers, _kinds(fields, config.num_layers), strict=True)
    )
    eps = fields.float("norm_eps", 1e-5)
    return replace(config, layers=layers, qk_norm="heads", norm_eps=eps, tied_head=tied)


def _adjusted(fields: Fields, ffn_size: int) -> int:
    """The MLP's width: two thirds of what the file says, in whole multiples, unless it says not."""
    if not fields.bool("block_auto_adjust_ff_dim", True):
        return ffn_size
    ffn_size = int(2 * ffn_size / 3)
    ffn_size = int(fields.float("block_ffn_dim_multiplier", 1.0) * ffn_size)
    multiple = fields.int("block_multiple_of", 256)
    return max(1, -(-ffn_size // multiple)) * multiple


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    """Which layers attend: `layer_types`, or else by `full_attn_idxs`, or else all."""
    name = "full_attn_idxs"
    attending = fields.indices(name, num_layers) if fields.has(name) else range(num_layers)
    usual = [_KINDS[i not in attending] for i in range(num_layers)]
    kinds = listed_kinds(fields, "layer_types", usual, _KINDS)
    if "full_attention" not in kinds:
        raise unsupported(fields, f"layer_types {brief(kinds)}", "one layer must attend")
    return kinds


FAMILY = Family(
    model_types=("lfm2",),
    parse=parse,
    names=TensorNames(
        attn_norm="operator_norm",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
        out="self_attn.out_proj",
        ffn_norm="ffn_norm",
        gate_up=("feed_forward.w1", "feed_forward.w3"),
        down="feed_forward.w2",
        final_norm="model.embedding_norm",
    ),
)
