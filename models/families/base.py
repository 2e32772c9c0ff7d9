"""What a family file provides, and the parts that several families share.

A family reads its configuration as transformers' class of that name does (5.24): the same defaults
for what is absent, the same switches. Fields that this class knows and that change the result are
either run or refused with their name and value; all others are ignored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import (
    Activation,
    DecoderConfig,
    Fields,
    LayerConfig,
    RopeConfig,
    brief,
)
from edgekv.models.families.names import HF_NAMES, TensorNames
from edgekv.models.rope_scaling import RopeUse, original_context, read_rope, scaling_kind

# Of all heads of a layer, many times what any model has: their rows are put in order before it is
# seen that a damaged configuration is of no tensors.
WIDTH_MAX = 1 << 20


class TensorShapes(Protocol):
    """What a family may ask of a checkpoint (`edgekv.models.checkpoint`)."""

    @property
    def names(self) -> frozenset[str]:
        """Of its tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Of one of them."""
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family are read."""

    model_types: tuple[str, ...]  # the `model_type` values that mean this family
    # Of `config.json`, and of the longest sequence that is wanted, if not the model's own.
    parse: Callable[[Fields, int | None], DecoderConfig]
    names: TensorNames = HF_NAMES  # in Hugging Face checkpoints
    # What only the tensors say.
    settle: Callable[[DecoderConfig, TensorNames, TensorShapes], DecoderConfig] | None = None
    # Where else checkpoints have the text model: what "model." is there, and the head's name.
    prefixes: tuple[tuple[str, str], ...] = (("", "lm_head"),)


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What transformers' class of a family takes where a file does not say it."""

    hidden_size: int = 4096
    intermediate_size: int
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None  # None: as many as there are query heads
    head_dim: int | None = None  # None: the hidden size divided by the heads
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6


# Of activations that the decoder has: what `transformers.activations.ACT2FN` calls them.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


def unsupported(fields: Fields, what: str, hint: str) -> UnsupportedModel:
    """Something that this family's models may have and edgekv does not run."""
    return UnsupportedModel(f"{fields.source}: {what} is not supported", hint=hint)


def tied_head(fields: Fields, text: Fields) -> bool | None:
    """`tie_word_embeddings` of a whole and of its text part; None: the tensors decide.

    transformers goes by the whole, mlx-lm by the text; both take a head that is there.
    """
    whole, part = (one.optional_bool("tie_word_embeddings") for one in (fields, text))
    return whole if part in (whole, None) else None


def refuse_unless(fields: Fields, name: str, *harmless: object) -> None:
    """Refuse a field that is there with any other value than these; null counts as absent.

    Raises:
        UnsupportedModel: With its name and value.
    """
    if fields.has(name) and fields.raw[name] not in harmless:
        known = " or ".join(map(repr, harmless)) or "absent"
        shown = fields.names.get(name, name)
        raise unsupported(fields, f"{shown} {brief(fields.raw[name])}", f"{shown} must be {known}")


def parse_shape(
    fields: Fields, family: str, defaults: Defaults, *, act: str = "hidden_act", gate: str = "silu"
) -> DecoderConfig:
    """What all but OpenELM have in common; the rope is plain yet, with a base of 10,000.

    `act` is the field of the gated MLP's activation, `gate` its default.
    """
    refuse_unless(fields, "per_layer_config", {})
    refuse_unless(fields, "is_causal", True)  # embedding models: transformers masks nothing
    refuse_unless(fields, "rope_traditional", False)  # mlx-lm's: pairs side by side
    hidden_size = fields.int("hidden_size", defaults.hidden_size)
    num_heads = fields.int("num_attention_heads", defaults.num_attention_heads)
    num_kv_heads = fields.optional_int("num_key_value_heads", defaults.num_key_value_heads)
    head_dim = fields.optional_int("head_dim", defaults.head_dim)
    activation = fields.str(act, gate)
    if activation not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise unsupported(fields, f"{act} {activation!r}", f"supported: {known}")
    layer = LayerConfig(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads or num_heads,
        head_dim=head_dim or max(1, hidden_size // num_heads),
        ffn_size=fields.int("intermediate_size", defaults.intermediate_size),
        rope=RopeConfig(base=10_000.0),
    )
    num_layers = fields.int("num_hidden_layers", defaults.num_hidden_layers, high=1024)
    return DecoderConfig(
        family=family,
        hidden_size=hidden_size,
        vocab_size=fields.int("vocab_size", defaults.vocab_size),
        context_max=fields.int("max_position_embeddings", defaults.max_position_embeddings),
        layers=(layer,) * num_layers,
        norm_eps=fields.float("rms_norm_eps", defaults.rms_norm_eps),
        attention_scale=layer.head_dim**-0.5,
        activation=_ACTIVATIONS[activation],
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )


def parse_llama_like(
    fields: Fields,
    family: str,
    defaults: Defaults,
    context_max: int | None,
    *,
    base: float = 10_000.0,
    rotated: float | None = None,
) -> DecoderConfig:
    """The configuration that llama, mistral, qwen2 and qwen3 have in common, without windows.

    `base` is of wavelengths where the file does not say it; `rotated` the part of a head that is
    rotated, of a family whose `partial_rotary_factor` may say so.
    """
    config = parse_shape(fields, family, defaults)
    scaling = flat_scaling(fields)
    dim = None if rotated is None else rotated_dim(config, scaling, fields, rotated)
    use = rope_use(config, scaling, fields, context_max, rotated=dim)
    rope = parse_rope(scaling, fields, use, base=fields.float("rope_theta", base))
    layers = tuple(replace(layer, rope=rope) for layer in config.layers)
    return replace(config, context_max=use.opened_context, layers=layers)


def rotated_dim(config: DecoderConfig, scaling: Fields, outer: Fields, usual: float) -> int:
    """A head's first dimensions that are rotated, by `partial_rotary_factor`."""
    name = "partial_rotary_factor"
    factor = outer.float(name, usual) if not scaling.has(name) else scaling.float(name)
    dim = int(config.layers[0].head_dim * factor)
    if not 0 < factor <= 1 or dim < 2 or dim % 2:
        raise CheckpointCorrupt(
            f"{outer.source}: field {name!r} is {factor:g}",
            hint=f"an even number of a head's {config.layers[0].head_dim} must be rotated",
        )
    return dim


def flat_scaling(fields: Fields) -> Fields:
    """`rope_scaling` (older files), or else `rope_parameters` (newer ones); empty: neither.

    Raises:
        UnsupportedModel: It tells layers apart, which this family's layers do not.
    """
    name = "rope_scaling" if fields.raw.get("rope_scaling") else "rope_parameters"
    scaling = fields.mapping(name) or Fields({}, fields.source)
    if any(isinstance(value, dict) for value in scaling.raw.values()):
        raise unsupported(fields, f"{name} {brief(scaling.raw)}", "supported: one for all layers")
    return scaling


def with_usual_rope(fields: Fields, usual: Mapping[str, object]) -> Fields:
    """With the `rope_parameters` that a family has where a file says nothing of its rope."""
    if fields.raw.get("rope_scaling") or fields.has("rope_parameters"):
        return fields
    raw = {**fields.raw, "rope_parameters": usual}
    return Fields(raw, fields.source, fields.names)


def scalings_by_kind(fields: Fields) -> dict[str, Fields]:
    """`rope_parameters` by kind of layer (newer files); `rope_scaling` is of the global ones.

    Raises:
        UnsupportedModel: They are said once for all layers, or in words that runtimes differ on.
    """
    parameters = fields.mapping("rope_parameters") or Fields({}, fields.source)
    kinds = ("full_attention", "sliding_attention")
    if parameters.raw and not any(kind in parameters.raw for kind in kinds):
        what = f"rope_parameters {brief(parameters.raw)}"
        raise unsupported(fields, what, "this family has them by " + " and ".join(kinds))
    scalings = {kind: parameters.mapping(kind) or Fields({}, fields.source) for kind in kinds}
    older = fields.mapping("rope_scaling")
    if older is not None:
        if older.has("type") and not older.has("rope_type"):
            # transformers 5 takes no notice of the older name here, 4 and mlx-lm do.
            raise unsupported(older, f"type {older.raw['type']!r}", "say it as rope_type")
        both = {**scalings["full_attention"].raw, **older.raw}
        scalings["full_attention"] = Fields(both, older.source, older.names)
    return scalings


def rope_use(
    config: DecoderConfig,
    scaling: Fields,
    outer: Fields,
    context_max: int | None,
    *,
    rotated: int | None = None,
) -> RopeUse:
    """What a rope is applied to, and how long sequences are: as wanted, or as the model goes.

    `rotated` are a head's first dimensions that are rotated; None: all. The length is
    `max_position_embeddings`, or with YaRN, where files keep the original there, `factor` times
    `original_max_position_embeddings`.
    """
    head_dim, longest = config.layers[0].head_dim, config.context_max
    if head_dim % 2 or head_dim > WIDTH_MAX:
        raise CheckpointCorrupt(
            f"{outer.source}: heads of size {head_dim} cannot be rotated",
            hint=f"the configuration is damaged or not of this family: {FETCH_AGAIN}",
        )
    if scaling_kind(scaling) == "yarn" and scaling.has("factor"):
        original = original_context(scaling, outer, 1)
        longest = max(longest, int(min(original * scaling.float("factor"), 1 << 24)))
    return RopeUse(
        head_dim=rotated or head_dim,
        model_context=config.context_max,
        opened_context=min(longest, context_max or longest),
        partial=rotated is not None and rotated != head_dim,
    )


def parse_rope(scaling: Fields, outer: Fields, use: RopeUse, *, base: float) -> RopeConfig:
    """See `read_rope`; heads that are rotated in part are refused where nobody asked for it."""
    rope = read_rope(scaling, outer, use, base=base)
    if use.partial:
        return replace(rope, rotated=use.head_dim)
    for holder in (scaling, outer):
        refuse_unless(holder, "partial_rotary_factor", 1)
    return rope


def expert_counts(
    fields: Fields,
    num_experts: int,
    num_chosen: int,
    names: tuple[str, ...] = ("num_experts", "num_local_experts"),
) -> tuple[int, int]:
    """How many experts there are and how many a row goes through, with what files do not say.

    `names` are what files call the first: transformers 5 has one name for all families.
    """
    said = [name for name in names if fields.has(name)] or [names[0]]
    num_experts = fields.int(said[0], num_experts, high=4096)
    for name in said[1:]:
        refuse_unless(fields, name, num_experts)
    return num_experts, fields.int("num_experts_per_tok", num_chosen, high=num_experts)


def with_windows(
    config: DecoderConfig, fields: Fields, kinds: list[str], window: int | None
) -> DecoderConfig:
    """Give the layers whose kind is "sliding_attention" a window of so many tokens.

    Raises:
        UnsupportedModel: There are such layers and no window.
    """
    if window is None and "sliding_attention" in kinds:
        raise unsupported(
            fields, f"layer_types {brief(kinds)} without a window", "set sliding_window"
        )
    layers = tuple(
        replace(layer, sliding_window=window if kind == "sliding_attention" else None)
        for layer, kind in zip(config.layers, kinds, strict=True)
    )
    return replace(config, layers=layers)


def layer_kinds(fields: Fields, num_layers: int, is_sliding: Callable[[int], bool]) -> list[str]:
    """The `layer_types` list of layers that attend, or one by index where the file has none."""
    known = ("full_attention", "sliding_attention")
    return listed_kinds(
        fields, "layer_types", [known[is_sliding(i)] for i in range(num_layers)], known
    )


def listed_kinds(fields: Fields, name: str, usual: list[str], known: tuple[str, ...]) -> list[str]:
    """A list of each layer's kind; `usual` where the file has none.

    Raises:
        UnsupportedModel: Its length or one of its values is unknown.
    """
    kinds = usual if fields.raw.get(name) is None else fields.raw[name]
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(usual)
        or not all(kind in known for kind in kinds)
    ):
        raise UnsupportedModel(
            f"{fields.source}: {name} is {brief(kinds)}",
            hint=f"it must list {len(usual)} of: {', '.join(known)}",
        )
    return kinds


def with_window_everywhere(
    config: DecoderConfig, fields: Fields, window: int | None
) -> DecoderConfig:
    """One window, or none, for every layer of a family whose layers are all alike.

    Raises:
        UnsupportedModel: `layer_types` says otherwise, which runtimes heed or do not.
    """
    usual = "full_attention" if window is None else "sliding_attention"
    kinds = layer_kinds(fields, config.num_layers, lambda _: window is not None)
    if any(kind != usual for kind in kinds):
        what = f"layer_types {brief(kinds)} of a {config.family}"
        raise unsupported(fields, what, f"it must be {usual}")
    return with_windows(config, fields, kinds, window)


def switched_windows(config: DecoderConfig, fields: Fields) -> DecoderConfig:
    """Qwen's windows: only where `use_sliding_window` says so, from `max_window_layers` on."""
    window = None
    if fields.bool("use_sliding_window", False):
        window = fields.optional_int("sliding_window", 4096)
    first = fields.int("max_window_layers", 28, low=0) if window is not None else 0
    kinds = layer_kinds(fields, config.num_layers, lambda i: window is not None and i >= first)
    return with_windows(config, fields, kinds, window)
