"""Gemma 4, text part: wide heads where all is seen, layers that share KV and are told of tokens.

In the small models the last layers make no keys and values but read those of the last layer of
their kind that does; in the large ones values are keys, or experts stand beside the MLP.
"""

from dataclasses import replace

from edgekv.errors import CheckpointCorrupt
from edgekv.models.config import (
    DecoderConfig,
    ExpertsConfig,
    Fields,
    LayerConfig,
    PerLayerInputs,
    RopeConfig,
)
from edgekv.models.families import gemma3
from edgekv.models.families.base import (
    Defaults,
    ExpertNames,
    Family,
    layer_kinds,
    parse_shape,
    refuse_unless,
    unsupported,
    with_windows,
)
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
_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPES = {
    _SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """Gemma 4's configuration, that of the text part where there are others."""
    text = fields.mapping("text_config") or fields
    refuse_unless(text, "use_bidirectional_attention", "vision")
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
        per_layer=_per_layer(text),
        layer_scales=True,
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )
    kinds = layer_kinds(text, config.num_layers, lambda i: (i + 1) % 6 != 0)
    if kinds[-1] != _FULL:
        raise unsupported(text, f"layer_types that end with {kinds[-1]}", f"it must be {_FULL}")
    config = with_windows(config, text, kinds, text.int("sliding_window", 512))
    return _with_shared(_with_heads(config, text, kinds), text, kinds)


def _per_layer(text: Fields) -> PerLayerInputs | None:
    size = text.int("hidden_size_per_layer_input", 256, low=0)
    if not size:
        return None
    return PerLayerInputs(size=size, vocab_size=text.int("vocab_size_per_layer_input", 262_144))


def _with_heads(config: DecoderConfig, text: Fields, kinds: list[str]) -> DecoderConfig:
    """Heads, ropes and experts of each layer; those that see everything have their own."""
    values_are_keys = text.bool("attention_k_eq_v", False)
    global_heads = config.layers[0].num_kv_heads
    if values_are_keys:
        global_heads = text.optional_int("num_global_key_value_heads", None) or global_heads
    global_dim = text.int("global_head_dim", 512)
    experts = _experts(text) if text.bool("enable_moe_block", False) else None
    layers = []
    for index, (layer, kind) in enumerate(zip(config.layers, kinds, strict=True)):
        layer = replace(layer, experts=experts)
        if kind == _FULL:
            layer = replace(
                layer,
                head_dim=global_dim,
                num_kv_heads=global_heads,
                values_are_keys=values_are_keys,
            )
        layer = _overridden(layer, text, index)
        layers.append(replace(layer, rope=_rope(text, kind, layer.head_dim, config.context_max)))
    return replace(config, layers=tuple(layers))


def _overridden(layer: LayerConfig, text: Fields, index: int) -> LayerConfig:
    """With what transformers 5 writes of single layers in place of the fields for global ones."""
    overrides = text.mapping("per_layer_config")
    if overrides is None:
        return layer
    names = [name for name in overrides.raw if name.isdigit() and int(name) == index]
    for one in (overrides.mapping(name) for name in names):
        assert one is not None
        for field in one.raw:
            if field not in {"head_dim", "num_key_value_heads"}:
                raise unsupported(one, f"field {field!r} of one layer", "head_dim alone may differ")
        layer = replace(
            layer,
            head_dim=one.int("head_dim", layer.head_dim),
            num_kv_heads=one.int("num_key_value_heads", layer.num_kv_heads),
        )
    return layer


def _rope(text: Fields, kind: str, head_dim: int, context: int) -> RopeConfig:
    """Of a "proportional" rope only the fastest pairs turn, as fast as if all did."""
    all_kinds = text.mapping("rope_parameters") or Fields(dict(_ROPES), text.source)
    scaling = all_kinds.mapping(kind) or Fields(dict(_ROPES[kind]), text.source)
    usual = _ROPES[kind]["rope_theta"]
    assert isinstance(usual, float)
    if scaling.str("rope_type", "default") != "proportional":
        refuse_unless(scaling, "partial_rotary_factor", 1)
        use = RopeUse(head_dim=head_dim, model_context=context, opened_context=context)
        return read_rope(scaling, scaling, use, base=usual)
    refuse_unless(scaling, "factor", 1)
    turning = int(head_dim * scaling.float("partial_rotary_factor", 1.0)) // 2
    factors = (1.0,) * turning + (float("inf"),) * (head_dim // 2 - turning)
    return RopeConfig(base=scaling.float("rope_theta", usual), wavelength_factors=factors)


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
        layer = layers[index]
        layers[index] = replace(layer, kv_from=sources[-1], ffn_size=wide * layer.ffn_size)
    return replace(config, layers=tuple(layers))


FAMILY = Family(
    model_types=("gemma4_text", "gemma4"),
    parse=parse,
    names=replace(
        gemma3.FAMILY.names,
        experts=ExpertNames(
            router="router.proj",
            stacked=tuple(f"experts.switch_glu.{part}_proj" for part in ("gate", "up", "down")),
            fused=("experts.gate_up_proj", "experts.down_proj"),
        ),
    ),
    prefixes=gemma3.FAMILY.prefixes,
)
