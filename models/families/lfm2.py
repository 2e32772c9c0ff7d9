"""LFM2: attention in a few layers, a gated short convolution in place of it in the others."""

from dataclasses import replace

from edgekv.errors import UnsupportedModel
from edgekv.models.config import ConvConfig, DecoderConfig, Fields, brief
from edgekv.models.families.base import Defaults, Family, TensorNames, parse_llama_like

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
    base = {"rope_theta": fields.float("rope_theta", 1e6), "head_dim": None}
    shape = Fields({**fields.raw, **base}, fields.source, fields.names)
    config = parse_llama_like(shape, "lfm2", DEFAULTS, context_max)
    conv = ConvConfig(
        size=fields.int("conv_L_cache", 3, low=2, high=256),
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
    if fields.has("block_ffn_dim_multiplier"):
        ffn_size = int(fields.float("block_ffn_dim_multiplier") * ffn_size)
    multiple = fields.int("block_multiple_of", 256)
    return -(-ffn_size // multiple) * multiple


def _kinds(fields: Fields, num_layers: int) -> list[str]:
    """Which layers attend: `layer_types`, or else by `full_attn_idxs`, or else all.

    Raises:
        UnsupportedModel: There is another kind, or no layer attends.
    """
    kinds, attend = fields.raw.get("layer_types"), fields.raw.get("full_attn_idxs")
    if kinds is None:
        if attend is not None and not isinstance(attend, list):
            raise _unknown(fields, "full_attn_idxs", "it must list the layers that attend")
        attending = range(num_layers) if attend is None else attend
        kinds = [_KINDS[i not in attending] for i in range(num_layers)]
    is_list = isinstance(kinds, list) and all(kind in _KINDS for kind in kinds)
    if not isinstance(kinds, list) or not is_list or len(kinds) != num_layers:
        raise _unknown(fields, "layer_types", f"it must list {num_layers} of: {', '.join(_KINDS)}")
    if "full_attention" not in kinds:
        raise _unknown(fields, "full_attn_idxs", "one layer must attend")
    return kinds


def _unknown(fields: Fields, name: str, hint: str) -> UnsupportedModel:
    return UnsupportedModel(f"{fields.source}: {name} is {brief(fields.raw.get(name))}", hint=hint)


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
