"""OpenELM (arXiv 2404.14619): every layer has its own number of heads and MLP width."""

from edgekv.models.config import DecoderConfig, Fields, LayerConfig, RopeConfig
from edgekv.models.families.base import Family, refuse_unless
from edgekv.models.families.names import TensorNames


def parse(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """OpenELM's configuration."""
    refuse_unless(fields, "ffn_with_glu", True)
    refuse_unless(fields, "activation_fn_name", "swish", "silu")
    refuse_unless(fields, "normalization_layer_name", "rms_norm")
    refuse_unless(fields, "rope_scaling", {})
    refuse_unless(fields, "partial_rotary_factor", 1)
    num_layers = fields.int("num_transformer_layers", high=1024)
    model_dim = fields.int("model_dim")
    head_dim = fields.int("head_dim")
    divisor = fields.int("ffn_dim_divisor", 256)
    rope = RopeConfig(base=fields.float("rope_freq_constant", 10_000.0))
    layers = tuple(
        LayerConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_size=_round_to_multiple(multiplier * model_dim, divisor),
            rope=rope,
        )
        for heads, kv_heads, multiplier in zip(
            fields.ints("num_query_heads", num_layers),
            fields.ints("num_kv_heads", num_layers),
            fields.floats("ffn_multipliers", num_layers),
            strict=True,
        )
    )
    longest = fields.int("max_context_length", 2048)
    return DecoderConfig(
        family="openelm",
        hidden_size=model_dim,
        vocab_size=fields.int("vocab_size"),
        context_max=min(longest, context_max or longest),
        layers=layers,
        norm_eps=fields.float("rms_norm_eps", 1e-6),
        attention_scale=head_dim**-0.5,
        qk_norm="heads" if fields.bool("normalize_qk_projections", True) else "none",
        tied_head=fields.optional_bool("share_input_output_layers"),
    )


def _round_to_multiple(value: float, divisor: int) -> int:
    """Nearest multiple of `divisor`, at least one of it and never below 90% of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


FAMILY = Family(
    model_types=("openelm",),
    parse=parse,
    names=TensorNames(
        embedding="transformer.token_embeddings",
        block="transformer.layers.{}.",
        attn_norm="attn_norm",
        qkv=("attn.qkv_proj",),
        q_norm="attn.q_norm",
        k_norm="attn.k_norm",
        out="attn.out_proj",
        ffn_norm="ffn_norm",
        gate_up=("ffn.proj_1",),
        down="ffn.proj_2",
        final_norm="transformer.norm",
    ),
    prefixes=(),
)
