"""What a family file provides, and the parts that several families share."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from edgekv.errors import UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, LayerConfig, RopeConfig


@dataclass(frozen=True, kw_only=True)
class LayerNames:
    """Tensor names of one block, without the block's prefix; tuples are stacked by rows."""

    attn_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    out: str = "self_attn.o_proj"
    attn_post_norm: str = ""
    ffn_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    ffn_post_norm: str = ""


@dataclass(frozen=True, kw_only=True)
class TensorNames(LayerNames):
    """Tensor names of a checkpoint; ".weight" and ".bias" are appended."""

    embedding: str = "model.embed_tokens"
    block: str = "model.layers.{}."
    final_norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How checkpoints of one family are read."""

    model_types: tuple[str, ...]  # the `model_type` values that mean this family
    parse: Callable[[Fields], DecoderConfig]  # of `config.json`
    names: TensorNames = TensorNames()  # in Hugging Face checkpoints


def unsupported(fields: Fields, what: str, hint: str) -> UnsupportedModel:
    """Something that this family's models may have and edgekv does not run."""
    return UnsupportedModel(f"{fields.source}: {what} is not supported", hint=hint)


def parse_rope(fields: Fields, *, base: float) -> RopeConfig:
    """Read `rope_scaling` (older files) or `rope_parameters` (newer ones), see `rope_of`."""
    scaling = fields.mapping("rope_scaling") or fields.mapping("rope_parameters")
    return RopeConfig(base=base) if scaling is None else rope_of(scaling, base=base)


def rope_of(scaling: Fields, *, base: float) -> RopeConfig:
    """Read one `rope_scaling` object, which may have a `rope_theta` of its own.

    Raises:
        UnsupportedModel: A scaling other than default, linear and llama3.
    """
    base = scaling.float("rope_theta", base)
    kind = scaling.str("rope_type", scaling.str("type", "default"))
    if kind == "default":
        return RopeConfig(base=base)
    if kind == "linear":
        return RopeConfig(base=base, position_scale=1.0 / scaling.float("factor"))
    if kind == "llama3":
        llama3 = (
            scaling.float("factor"),
            scaling.float("low_freq_factor", 1.0),
            scaling.float("high_freq_factor", 4.0),
            scaling.float("original_max_position_embeddings", 8192.0),
        )
        return RopeConfig(base=base, llama3=llama3)
    raise unsupported(scaling, f"rope scaling {kind!r}", "supported: default, linear, llama3")


def parse_llama_like(fields: Fields, *, family: str, rope_base: float = 10_000.0) -> DecoderConfig:
    """The configuration that llama, qwen2 and qwen3 have in common."""
    hidden_size = fields.int("hidden_size")
    num_heads = fields.int("num_attention_heads")
    head_dim = fields.int("head_dim", max(1, hidden_size // num_heads))
    if fields.float("partial_rotary_factor", 1.0) != 1.0:
        raise unsupported(fields, "partial rotary embedding", "partial_rotary_factor must be 1")
    activation = fields.str("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise unsupported(fields, f"activation {activation!r}", "supported: silu")
    layer = LayerConfig(
        num_heads=num_heads,
        num_kv_heads=fields.int("num_key_value_heads", num_heads),
        head_dim=head_dim,
        ffn_size=fields.int("intermediate_size"),
        rope=parse_rope(fields, base=fields.float("rope_theta", rope_base)),
    )
    return DecoderConfig(
        family=family,
        hidden_size=hidden_size,
        vocab_size=fields.int("vocab_size"),
        context_max=fields.int("max_position_embeddings", 4096),
        layers=(layer,) * fields.int("num_hidden_layers", high=1024),
        norm_eps=fields.float("rms_norm_eps", 1e-6),
        attention_scale=head_dim**-0.5,
        tied_head=fields.optional_bool("tie_word_embeddings"),
    )


def with_windows(
    config: DecoderConfig, window: int | None, is_sliding: Callable[[int], bool]
) -> DecoderConfig:
    """Give the layers for which `is_sliding(index)` holds a sliding window."""
    layers = tuple(
        replace(layer, sliding_window=window if is_sliding(i) else None)
        for i, layer in enumerate(config.layers)
    )
    return replace(config, layers=layers)


def layer_kinds(fields: Fields, num_layers: int) -> list[str] | None:
    """The `layer_types` list, or None where the file has none.

    Raises:
        UnsupportedModel: Its length or one of its values is unknown.
    """
    kinds = fields.raw.get("layer_types")
    if kinds is None:
        return None
    known = {"full_attention", "sliding_attention"}
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= known:
        raise UnsupportedModel(
            f"{fields.source}: layer_types is {kinds!r}",
            hint=f"it must list {num_layers} of: {', '.join(sorted(known))}",
        )
    return kinds
