"""Qwen 3.5 and Qwen3-Next: three of four layers are Gated DeltaNet, the fourth attends, gated."""

from dataclasses import replace

from edgekv.errors import CheckpointCorrupt
from edgekv.models.config import DecoderConfig, DeltaConfig, ExpertsConfig, Fields
from edgekv.models.families.base import (
    Defaults,
    Family,
    TensorShapes,
    listed_kinds,
    parse_llama_like,
    refuse_unless,
    tied_head,
)
from edgekv.models.families.names import TensorNames
from edgekv.models.families.qwen3_moe import read_experts, with_experts

DEFAULTS = Defaults(
    intermediate_size=12_288,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=248_320,
    max_position_embeddings=32_768,
)
MOE_DEFAULTS = replace(
    DEFAULTS,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=40,
    num_key_value_heads=2,
)
NEXT_DEFAULTS = replace(MOE_DEFAULTS, num_hidden_layers=48, vocab_size=151_936)
_EXPERTS = ExpertsConfig(
    num_experts=256, num_chosen=8, ffn_size=512, shared_size=512, shared_gate=True
)
_NEXT_EXPERTS = replace(_EXPERTS, num_experts=512, num_chosen=10)
_KINDS = ("linear_attention", "full_attention")


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen 3.5's configuration, that of the text part where there are others."""
    text = fields.mapping("text_config") or fields
    refuse_unless(text, "num_experts", 0)
    config = _parse(text, "qwen3_5", DEFAULTS, context_max)
    return replace(config, tied_head=tied_head(fields, text))


def parse_moe(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """The same with experts in every block."""
    text = fields.mapping("text_config") or fields
    for name, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", []), ("norm_topk_prob", 1)):
        refuse_unless(text, name, usual)  # mlx-lm reads them, transformers does not
    config = _parse(text, "qwen3_5_moe", MOE_DEFAULTS, context_max)
    config = replace(config, tied_head=tied_head(fields, text))
    return with_experts(config, text, read_experts(text, _EXPERTS))


def parse_next(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Qwen3-Next's configuration."""
    config = _parse(fields, "qwen3_next", NEXT_DEFAULTS, context_max)
    return with_experts(config, fields, read_experts(fields, _NEXT_EXPERTS))


def _parse(
    fields: Fields, family: str, defaults: Defaults, context_max: int | None
) -> DecoderConfig:
    refuse_unless(fields, "attn_output_gate", True)
    config = parse_llama_like(fields, family, defaults, context_max, rotated=0.25)
    bias = fields.bool("attention_bias", False)
    delta = DeltaConfig(
        num_key_heads=fields.int("linear_num_key_heads", 16),
        num_value_heads=fields.int("linear_num_value_heads", 32),
        key_dim=fields.int("linear_key_head_dim", 128),
        value_dim=fields.int("linear_value_head_dim", 128),
        conv_size=fields.int("linear_conv_kernel_dim", 4, low=2, high=64),
    )
    if delta.num_value_heads % delta.num_key_heads:
        raise CheckpointCorrupt(
            f"{fields.source}: field 'linear_num_value_heads' is {delta.num_value_heads}",
            hint=f"it must be a multiple of linear_num_key_heads, {delta.num_key_heads}",
        )
    interval = fields.int("full_attention_interval", 4)
    usual = [_KINDS[(i + 1) % interval == 0] for i in range(config.num_layers)]
    kinds = listed_kinds(fields, "layer_types", usual, _KINDS)
    return replace(
        config,
        qk_norm="heads",
        qkv_bias=bias,
        out_bias=bias,
        output_gate=True,
        layers=tuple(
            layer if kind == "full_attention" else replace(layer, delta=delta)
            for layer, kind in zip(config.layers, kinds, strict=True)
        ),
    )


def settle(config: DecoderConfig, names: TensorNames, checkpoint: TensorShapes) -> DecoderConfig:
    """Hugging Face stores norms less one; MLX's converter adds it, and turns the convolutions."""
    index = next((i for i, layer in enumerate(config.layers) if layer.delta is not None), None)
    if index is None:
        return config
    name = f"{names.block.format(index)}{names.delta_conv}.weight"
    converted = name not in checkpoint.names or checkpoint.shape(name)[-1:] == (1,)
    return config if converted else replace(config, norm_offset=1.0)


_PREFIXES = (
    ("language_model.model.", "language_model.lm_head"),
    ("model.language_model.", "lm_head"),
    ("", "lm_head"),
)
FAMILY = Family(
    model_types=("qwen3_5", "qwen3_5_text"), parse=parse, settle=settle, prefixes=_PREFIXES
)
MOE = Family(
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    parse=parse_moe,
    settle=settle,
    prefixes=_PREFIXES,
)
NEXT = Family(
    model_types=("qwen3_next",),
    parse=parse_next,
    settle=settle,
    names=TensorNames(delta_in=("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba")),
)
