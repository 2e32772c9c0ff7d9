"""Gemma 4, text part: wide heads where all is seen, layers that share KV and are told of tokens.

In the small models the last layers make no keys and values but read those of the last layer of
their kind that does; in the large ones values are keys, or experts stand beside the MLP.
"""

import re
from dataclasses import replace

from edgekv.errors import CheckpointCorrupt
from edgekv.models.config import (
    DecoderConfig,
    ExpertsConfig,
    Fields,
    LayerConfig,
    PerLayerInputs,
    RopeConfig,
    brief,
)
from edgekv.models.families import gemma3
from edgekv.models.families.base import (
    Defaults,
    Family,
    layer_kinds,
    parse_shape,
    refuse_unless,
    scalings_by_kind,
    unsupported,
    with_windows,
)
from edgekv.models.families.names import ExpertNames
from edgekv.models.rope_scaling import RopeUse, read_rope

DEFAULTS = Defaults(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=30,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=256,
    vocab_size=262_144,
    max_position_embeddings=131_072,
)
_INDEX = re.compile("[0-9]{1,4}")  # "05" too, as transformers writes it
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Gemma 4's configuration, that of the text part where there are others."""
    text = fields.mapping("text_config") or fields
    refuse_unless(text, "use_bidirectional_attention", "vision")
    refuse_unless(text, "rope_scaling")
    plain = Fields({**text.raw, "per_layer_config": None}, text.source, text.names)
    config = parse_shape(
        plain, "gemma4", DEFAULTS, act="hidden_activation", gate="gelu_pytorch_tanh"
    )
    bias = text.bool("attention_bias", False)
    config = replace(
        config,
        context_max=min(config.context_max, context_max or config.context_max),
        attention_scale=1.0,
        embedding_scale=gemma3.embedding_scale(config, fields, text),
        qk_norm="heads",
        value_norm=True,
        post_norms=True,
        qkv_bias=bias,
        out_bias=bias,
        logits_softcap=text.optional_float("final_logit_softcapping", None),
        per_layer=_per_layer(text, config.vocab_size),
        layer_scales=True,
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )
    last = config.num_layers - 1
    kinds = layer_kinds(text, config.num_layers, lambda i: (i + 1) % 6 != 0 and i != last)
    if kinds[-1] != _FULL:
        raise unsupported(text, f"layer_types that end with {kinds[-1]}", f"it must be {_FULL}")
    config = with_windows(config, text, kinds, text.int("sliding_window", 512))
    return _with_shared(_with_heads(config, text, kinds), text, kinds)


def _per_layer(text: Fields, vocab_size: int) -> PerLayerInputs | None:
    size = text.int("hidden_size_per_layer_input", 256, low=0)
    if not size:
        return None
    rows = text.int("vocab_size_per_layer_input", 262_144, low=vocab_size)
    return PerLayerInputs(size=size, vocab_size=rows)


def _with_heads(config: DecoderConfig, text: Fields, kinds: list[str]) -> DecoderConfig:
    """Heads, ropes and experts of each layer; those that see everything have their own."""
    values_are_keys = text.bool("attention_k_eq_v", False)
    experts = _experts(text) if text.bool("enable_moe_block", False) else None
    layers = []
    for layer, kind in zip(_with_own_heads(config, text, kinds), kinds, strict=True):
        rope = _rope(text, kind, layer.head_dim, config.context_max)
        shared = values_are_keys and kind == _FULL
        layers.append(replace(layer, rope=rope, experts=experts, values_are_keys=shared))
    return replace(config, layers=tuple(layers))


def _with_own_heads(config: DecoderConfig, text: Fields, kinds: list[str]) -> list[LayerConfig]:
    """Layers with their sizes and numbers of heads: older files say those of global layers."""
    if (newer := text.mapping("per_layer_config")) is not None:
        return _overridden(config, newer)
    head_dim, heads = text.int("global_head_dim", 512), None
    if text.bool("attention_k_eq_v", False):
        heads = text.optional_int("num_global_key_value_heads", None)
    return [
        replace(layer, head_dim=head_dim, num_kv_heads=heads or layer.num_kv_heads)
        if kind == _FULL
        else layer
        for layer, kind in zip(config.layers, kinds, strict=True)
    ]


def _overridden(config: DecoderConfig, overrides: Fields) -> list[LayerConfig]:
    """What transformers 5 writes of single layers, by their index."""
    layers = list(config.layers)
    for name in overrides.raw:
        one, index = overrides.mapping(name), int(name) if _INDEX.fullmatch(name) else -1
        if one is None or not 0 <= index < len(layers):
            hint = f"it must be an object of a layer from 0 to {len(layers) - 1}"
            raise CheckpointCorrupt(f"{overrides.source}: no layer {brief(name)}", hint=hint)
        for field in one.raw:
            if field not in {"head_dim", "num_key_value_heads"}:
                raise unsupported(one, f"field {field!r} of one layer", "heads alone may differ")
        layer = layers[index]
        layers[index] = replace(
            layer,
            head_dim=one.int("head_dim", layer.head_dim),
            num_kv_heads=one.int("num_key_value_heads", layer.num_kv_heads),
        )
    return layers


def _rope(text: Fields, kind: str, head_dim: int, context: int) -> RopeConfig:
    """Of a "proportional" rope only the fastest pairs turn, as fast as if all did."""
    scaling = scalings_by_kind(text)[kind]
    if not scaling.raw:
        scaling = Fields(dict(_ROPES[kind]), text.source)
    usual = _ROPES[kind]["rope_theta"]
    assert isinstance(usual, float)
    if scaling.str("rope_type", "default") != "proportional":
        refuse_unless(scaling, "partial_rotary_factor", 1)
        use = RopeUse(head_dim=head_dim, model_context=context, opened_context=context)
        return read_rope(scaling, scaling, use, base=usual)
    refuse_unless(scaling, "factor", 1)
    turning = _turning_pairs(scaling, head_dim)
    factors = (1.0,) * turning + (float("inf"),) * (head_dim // 2 - turning)
    return RopeConfig(base=scaling.float("rope_theta", usual), wavelength_factors=factors)


def _turning_pairs(scaling: Fields, head_dim: int) -> int:
    part = scaling.float("partial_rotary_factor", 1.0)
    if part > 1:
        raise CheckpointCorrupt(
            f"{scaling.source}: field 'partial_rotary_factor' is {part:g}",
            hint="no more of a head than all of it can turn",
        )
    return int(head_dim * part) // 2


def _experts(text: Fields) -> ExpertsConfig:
    num_experts = text.int("num_experts", high=4096)
    return ExpertsConfig(
        num_experts=num_experts,
        num_chosen=text.int("top_k_experts", high=num_experts),
        ffn_size=text.int("moe_intermediate_size"),
        expert_scales=True,
        beside=True,
    )


def _with_shared(config: DecoderConfig, text: Fields, kinds: list[str]) -> DecoderConfig:
    """The last layers read the KV of the last layer of their kind before them."""
    num_shared = text.int("num_kv_shared_layers", 0, low=0, high=config.num_layers - 1)
    first = config.num_layers - num_shared
    wide = 2 if text.bool("use_double_wide_mlp", False) else 1
    layers = list(config.layers)
    for index in range(first, config.num_layers):
        sources = [i for i in range(first) if kinds[i] == kinds[index]]
        if not sources:
            raise CheckpointCorrupt(
                f"{text.source}: field 'num_kv_shared_layers' is {num_shared}",
                hint=f"no layer before the last {num_shared} is of kind {kinds[index]}",
            )
        layer, source = layers[index], layers[sources[-1]]
        if (layer.head_dim, layer.num_kv_heads) != (source.head_dim, source.num_kv_heads):
            raise CheckpointCorrupt(
                f"{text.source}: field 'num_kv_shared_layers' is {num_shared}",
                hint=f"layer {index} reads keys of layer {sources[-1]}, whose heads are others",
            )
        layers[index] = replace(layer, kv_from=sources[-1], ffn_size=wide * layer.ffn_size)
    return replace(config, layers=tuple(layers))


FAMILY = Family(
    model_types=("gemma4_text", "gemma4"),
    parse=parse,
    names=replace(
        gemma3.FAMILY.names,
        experts=ExpertNames(
            router="router.proj",
            each=tuple(f"experts.{{}}.{part}_proj" for part in ("gate", "up", "down")),
            stacked=tuple(f"experts.switch_glu.{part}_proj" for part in ("gate", "up", "down")),
            fused=("experts.gate_up_proj", "experts.down_proj"),
        ),
    ),
    prefixes=gemma3.FAMILY.prefixes,
)
