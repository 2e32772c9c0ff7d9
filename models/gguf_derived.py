"""What of a GGUF file's configuration is not one field of Hugging Face's for one key.

Each function is of an architecture: it has the fields that are read key by key, and completes them.
What llama.cpp's loader takes for granted where a key is absent is told by `load_arch_hparams` in
its `src/models/*.cpp`.
"""

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import brief
from edgekv.models.gguf_keys import Keys

# A tensor with a factor for each rotary pair's wavelength; longrope has two of them.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_STANDS_STILL = 1e20  # times a wavelength: nothing turns within any context

Json = dict[str, object]  # the fields of a `config.json`


def nothing(fields: Json, keys: Keys) -> None:
    """All is said key by key."""


def llama(fields: Json, keys: Keys) -> None:
    """Mixtral is a Llama with experts."""
    if keys.int("expert_count", 0, low=0):
        fields["model_type"] = "mixtral"


def _said_scaling(fields: Json) -> Json:
    """How a rope is stretched; where it is not, that is said, for some families have a default."""
    scaling = fields["rope_scaling"]
    return scaling if isinstance(scaling, dict) else {"rope_type": "default"}


# --- windows ---


def _kinds(slides: list[bool]) -> list[str]:
    return ["sliding_attention" if one else "full_attention" for one in slides]


def gemma2(fields: Json, keys: Keys) -> None:
    """Gemma 2's scores and logits are bent as in its family where no key says how far."""
    fields["layer_types"] = _kinds(keys.sliding(2))
    fields["sliding_window"] = keys.int("attention.sliding_window", 4096)
    fields["query_pre_attn_scalar"] = _gemma_scalar(keys, num_layers_27b=46)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields[name] is None:
            del fields[name]


def gemma3(fields: Json, keys: Keys) -> None:
    """Without a window every layer sees everything."""
    fields["query_pre_attn_scalar"] = _gemma_scalar(keys, num_layers_27b=62)
    if not keys.get("attention.sliding_window"):
        fields["layer_types"] = _kinds([False] * keys.num_layers)
        return
    fields["layer_types"] = _kinds(keys.sliding(6))
    fields["sliding_window"] = keys.get("attention.sliding_window")
    fields["rope_local_base_freq"] = keys.get("rope.freq_base_swa", 10_000.0)


def _gemma_scalar(keys: Keys, num_layers_27b: int) -> float:
    """What scores are divided by the root of: the size of a head, but in the 27B model."""
    if keys.num_layers != num_layers_27b:
        return keys.head_dim
    return keys.int("embedding_length") / keys.int("attention.head_count")


def gpt_oss(fields: Json, keys: Keys) -> None:
    """YaRN as the model is published, which no key says; llama.cpp rounds, as for other models."""
    fields["layer_types"] = _kinds(keys.sliding(2))
    fields["rope_scaling"] = _said_scaling(fields) | {"truncate": False}


def olmo2(fields: Json, keys: Keys) -> None:
    """OLMo 2 and 3; only the latter has windows."""
    slides = [False] * keys.num_layers
    if keys.get("attention.sliding_window"):
        slides = keys.sliding(4)
        fields["sliding_window"] = keys.get("attention.sliding_window")
    fields["layer_types"] = _kinds(slides)
    base = {"rope_theta": keys.get("rope.freq_base")}
    fields["rope_parameters"] = {
        "full_attention": _said_scaling(fields) | base,
        "sliding_attention": {"rope_type": "default"} | base,
    }
    fields["rope_scaling"] = None


# --- Gemma 4 ---


def gemma4(fields: Json, keys: Keys) -> None:
    """Where values are keys there is no tensor of values."""
    slides = keys.layer_flags("attention.sliding_window_pattern")
    num_shared = min(keys.int("attention.shared_kv_layers", 0, low=0), keys.num_layers)
    first_shared = keys.num_layers - num_shared
    without = [i for i in range(first_shared) if f"blk.{i}.attn_v.weight" not in keys.tensors]
    values_are_keys = any(not slides[i] for i in without)
    widths = keys.layer_ints("feed_forward_length")
    wide = widths[-1] == 2 * widths[0]
    if widths != [widths[0]] * first_shared + [widths[0] * (1 + wide)] * num_shared:
        raise keys.unsupported("feed_forward_length")
    for key, other in (
        ("rope.dimension_count", "attention.key_length"),
        ("rope.dimension_count_swa", "attention.key_length_swa"),
        ("attention.value_length_swa", "attention.key_length_swa"),
    ):
        if keys.has(key) and keys.get(key) != keys.get(other):
            raise keys.unsupported(key)
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10_000.0)}
    fields |= _gemma4_heads(keys, slides, values_are_keys) | {
        "layer_types": _kinds(slides),
        "num_kv_shared_layers": keys.int("attention.shared_kv_layers", 0, low=0),
        "intermediate_size": widths[0],
        "use_double_wide_mlp": wide,
        "enable_moe_block": keys.int("expert_count", 0, low=0) > 0,
        "rope_parameters": {"full_attention": _proportional(keys), "sliding_attention": local},
    }


def _gemma4_heads(keys: Keys, slides: list[bool], values_are_keys: bool) -> Json:
    """Heads of keys and values; layers that see everything have others only if values are keys."""
    heads = keys.layer_ints("attention.head_count_kv")
    by_kind = dict(zip(slides, heads, strict=True))
    alike = values_are_keys or len(set(heads)) == 1
    if not alike or heads != [by_kind[one] for one in slides]:
        raise keys.unsupported("attention.head_count_kv")
    return {
        "num_key_value_heads": by_kind.get(True, heads[0]),
        "num_global_key_value_heads": by_kind.get(False),
        "attention_k_eq_v": values_are_keys,
    }


def _proportional(keys: Keys) -> Json:
    """The rope of layers that see everything: pairs with a huge factor do not turn."""
    factors = keys.rope_factors.get(ROPE_FREQS)
    if factors is None:
        raise CheckpointCorrupt(f"{keys.source}: tensor {ROPE_FREQS!r} is missing")
    head_dim, num_turning = keys.int("attention.key_length"), factors.count(1.0)
    if len(factors) != head_dim // 2 or min(factors[num_turning:], default=1e30) < _STANDS_STILL:
        raise UnsupportedModel(
            f"{keys.source}: {ROPE_FREQS} {brief(factors)} is not supported",
            hint=f"of its {head_dim // 2} factors some must be 1, and then all 1e30",
        )
    return {
        "rope_type": "proportional",
        "rope_theta": keys.get("rope.freq_base"),
        "partial_rotary_factor": _part(2 * num_turning, head_dim),
    }


# --- heads that are rotated in part ---


def _part(rotated: int, head_dim: int) -> float:
    """A part of a head as a family takes it: multiplied by the head, and rounded down."""
    return 1.0 if rotated == head_dim else (rotated + 0.5) / head_dim


def _rotated_part(keys: Keys) -> float:
    return _part(keys.int("rope.dimension_count", keys.head_dim), keys.head_dim)


def phi3(fields: Json, keys: Keys) -> None:
    """A window of 0 is none; llama.cpp reads it too, but runs without any."""
    fields["original_max_position_embeddings"] = _original_context(keys)
    fields["partial_rotary_factor"] = _rotated_part(keys)
    fields["sliding_window"] = keys.get("attention.sliding_window") or None


def _original_context(keys: Keys) -> int:
    return keys.int("rope.scaling.original_context_length", keys.int("context_length"))


# --- multipliers ---


def granite(fields: Json, keys: Keys) -> None:
    """A multiplier of 0 is none; rope is switched off by a key that is called otherwise."""
    for name, usual in (
        ("attention_multiplier", keys.head_dim**-0.5),
        ("embedding_multiplier", 1.0),
        ("residual_multiplier", 1.0),
        ("logits_scaling", 1.0),
    ):
        fields[name] = fields[name] or usual
    if not keys.get("rope.scaling.finetuned", True):
        raise keys.unsupported("rope.scaling.finetuned")


def ministral3(fields: Json, keys: Keys) -> None:
    """YaRN's `mscale` is 1 where there is an `mscale_all_dim`, as llama.cpp assumes."""
    fields["rope_scaling"] = _said_scaling(fields) | {
        "original_max_position_embeddings": _original_context(keys),
        "mscale": 1.0,
        "mscale_all_dim": keys.float("rope.scaling.yarn_log_multiplier", 0.0),
        "llama_4_scaling_beta": keys.float("attention.temperature_scale", 0.0),
    }


# --- layers that do not attend by heads ---


def delta(fields: Json, keys: Keys) -> None:
    """Gated DeltaNet in all layers but every n-th, or as a list says."""
    num_heads, inner = keys.int("ssm.time_step_rank"), keys.int("ssm.inner_size")
    if inner % num_heads:
        raise keys.garbled("ssm.inner_size", f"it must be a multiple of {num_heads} heads")
    every = keys.int("full_attention_interval", 4)
    recurrent = [(index + 1) % every != 0 for index in range(keys.num_layers)]
    if keys.has("attention.recurrent_layers"):
        recurrent = keys.layer_flags("attention.recurrent_layers")
    fields |= {
        "linear_value_head_dim": inner // num_heads,
        "partial_rotary_factor": _rotated_part(keys),
        "layer_types": ["linear_attention" if one else "full_attention" for one in recurrent],
    }


def latent(fields: Json, keys: Keys) -> None:
    """Files from before 2025-04 have sizes of heads where later ones have those of the latent."""
    rotated = keys.int("rope.dimension_count")
    key_dim = keys.int("attention.key_length_mla", keys.int("attention.key_length"))
    if key_dim <= rotated:
        raise keys.garbled("rope.dimension_count", f"keys have {key_dim} numbers in all")
    sigmoid = 2  # `ExpertGatingFuncType`; GLM-4.7-Flash's older files do not say it
    is_glm = keys.num_layers in (47, 48) and keys.get("vocab_size") == 154_880
    if (keys.get("expert_gating_func") or (sigmoid if is_glm else 1)) != sigmoid:
        raise keys.unsupported("expert_gating_func", 1)
    fields |= {
        "qk_rope_head_dim": rotated,
        "qk_nope_head_dim": key_dim - rotated,
        "v_head_dim": keys.int("attention.value_length_mla", keys.int("attention.value_length")),
        "num_key_value_heads": None,  # to llama.cpp the latent is one head
        "head_dim": None,
        "n_group": fields["n_group"] or 1,
        "topk_group": fields["topk_group"] or 1,
        "routed_scaling_factor": fields["routed_scaling_factor"] or 1.0,
        "norm_topk_prob": keys.get("expert_weights_norm", False),
        "first_k_dense_replace": keys.int("leading_dense_block_count", 0, low=0),
    }
    scaling, log_multiplier = fields["rope_scaling"], "rope.scaling.yarn_log_multiplier"
    if isinstance(scaling, dict) and keys.has(log_multiplier):
        # The converter multiplies `mscale_all_dim` by 0.1, and llama.cpp takes `mscale` for equal.
        all_dim = keys.float(log_multiplier, 0.0) / 0.1
        fields["rope_scaling"] = scaling | {"mscale": all_dim, "mscale_all_dim": all_dim}


def lfm2(fields: Json, keys: Keys) -> None:
    """Layers without keys and values are short convolutions."""
    heads = keys.layer_ints("attention.head_count_kv")
    if len(set(heads) - {0}) != 1:
        raise keys.unsupported("attention.head_count_kv")
    if keys.get("attention.sliding_window"):
        raise keys.unsupported("attention.sliding_window")
    fields |= {
        "num_key_value_heads": max(heads),
        "layer_types": ["full_attention" if one else "conv" for one in heads],
        "conv_bias": any(name.endswith(".shortconv.conv.bias") for name in keys.tensors),
    }


def openelm(fields: Json, keys: Keys) -> None:
    """Each layer's MLP has a width of its own."""
    widths, hidden_size = "feed_forward_length", keys.int("embedding_length")
    if not isinstance(keys.get(widths), list):
        raise keys.garbled(widths, f"it must list {keys.num_layers} whole numbers")
    fields["ffn_multipliers"] = [width / hidden_size for width in keys.layer_ints(widths)]
