"""GGUF metadata → the same fields and names as the family's Hugging Face checkpoint.

Sources: the GGUF specification, llama.cpp's architecture tables and `llama_model::load_hparams`.
What llama.cpp's converter changed in the numbers is said here too: query and key rows of "llama"
files are permuted for interleaved rotary pairs; Gemma's norm weights already have their 1 added.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import LayerConfig, brief
from edgekv.models.families.base import TensorNames

# What Hugging Face calls a field, in OpenELM and in all others, and what GGUF does.
_FIELDS = (
    ("model_dim", "hidden_size", "embedding_length"),
    ("num_transformer_layers", "num_hidden_layers", "block_count"),
    ("intermediate_size", "intermediate_size", "feed_forward_length"),
    ("num_query_heads", "num_attention_heads", "attention.head_count"),
    ("num_kv_heads", "num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "head_dim", "attention.key_length"),
    ("rms_norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("max_context_length", "max_position_embeddings", "context_length"),
    ("rope_freq_constant", "rope_theta", "rope.freq_base"),
    ("vocab_size", "vocab_size", "vocab_size"),
)
_REQUIRED = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
    "context_length",
)
# Other names by which errors call what a Hugging Face configuration has.
_MORE_NAMES = {
    "rope_scaling": "rope.scaling",
    "factor": "rope.scaling.factor",
    "attention_factor": "rope.scaling.attn_factor",
    "original_max_position_embeddings": "rope.scaling.original_context_length",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "rope_local_base_freq": "rope.freq_base_swa",
}
# Keys that change the result with any other value than these; edgekv runs none of what they mean.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
    "rope.scaling.yarn_ext_factor": (1, -1),  # -1: not set
    "rope.scaling.yarn_log_multiplier": (0,),
}

# Tensors with a factor for each rotary pair's wavelength; longrope has two of them.
ROPE_FREQS = "rope_freqs.weight"
ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"

NAMES = TensorNames(
    embedding="token_embd",
    block="blk.{}.",
    attn_norm="attn_norm",
    qkv=("attn_q", "attn_k", "attn_v"),
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    out="attn_output",
    attn_post_norm="post_attention_norm",
    ffn_norm="ffn_norm",
    gate_up=("ffn_gate", "ffn_up"),
    down="ffn_down",
    ffn_post_norm="post_ffw_norm",
    final_norm="output_norm",
    head="output",
)

SUPPORTED = ("llama", "qwen2", "qwen3", "gemma3", "openelm")


def tensor_names(architecture: str) -> TensorNames:
    """Names of an architecture's tensors in a GGUF file."""
    if architecture == "openelm":
        return replace(NAMES, qkv=("attn_qkv",))
    return NAMES


def field_names(architecture: str) -> dict[str, str]:
    """The keys of a GGUF file by the fields of a Hugging Face configuration."""
    usual = 0 if architecture == "openelm" else 1
    keys = {row[usual]: row[2] for row in _FIELDS} | _MORE_NAMES
    tensors = {"long_factor": ROPE_LONG, "short_factor": ROPE_SHORT}
    return {field: f"{architecture}.{key}" for field, key in keys.items()} | tensors


def to_hf_fields(
    metadata: Mapping[str, object],
    source: str,
    rope_factors: Mapping[str, Sequence[float]] | None = None,
) -> dict[str, object]:
    """The `config.json` that this file's metadata amounts to.

    Args:
        metadata: Of the file.
        source: What errors call it.
        rope_factors: What the tensors `ROPE_LONG` and `ROPE_SHORT` hold, if it has them.

    Raises:
        UnsupportedModel: An architecture or a value that edgekv does not run.
        CheckpointCorrupt: A field is missing, or of the wrong kind.
    """
    arch = metadata.get("general.architecture")
    if arch not in SUPPORTED:
        raise UnsupportedModel(
            f"{source}: GGUF architecture {arch!r} is not supported",
            hint="supported: " + ", ".join(SUPPORTED),
        )
    own = {
        key.removeprefix(f"{arch}."): value for key, value in metadata.items() if value is not None
    }
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):  # right where the key contradicts it
        own["vocab_size"] = len(tokens)
    _check(own, str(arch), source)
    openelm = arch == "openelm"
    fields = {theirs if openelm else usual: own.get(key) for theirs, usual, key in _FIELDS}
    fields["model_type"] = "gemma3_text" if arch == "gemma3" else arch
    fields["rope_freq_constant" if openelm else "rope_theta"] = own.get("rope.freq_base", 10_000.0)
    fields["rope_scaling"] = _rope_scaling(own, f"{source}: {arch}", rope_factors)
    if arch == "gemma3":
        _gemma3(fields, own)
    if openelm:
        _openelm(fields, own, source)
    return fields


def _check(own: Mapping[str, object], arch: str, source: str) -> None:
    """Nothing is missing, and nothing says what edgekv does not run."""
    for key in (*_REQUIRED, "vocab_size"):
        if key not in own:
            raise CheckpointCorrupt(f"{source}: field '{arch}.{key}' is missing")
    for key, harmless in _HARMLESS.items():
        if own.get(key, harmless[0]) not in harmless:
            raise _unsupported(f"{source}: {arch}", key, own[key])
    key = "attention.value_length"
    if key in own and own[key] != own.get("attention.key_length", own[key]):
        raise _unsupported(f"{source}: {arch}", key, own[key])
    sections = own.get("rope.dimension_sections")
    if sections and not (isinstance(sections, list) and not any(sections)):
        raise _unsupported(f"{source}: {arch}", "rope.dimension_sections", sections)
    rotated, whole = own.get("rope.dimension_count"), _head_dim(own)
    if rotated is not None and whole is not None and rotated != whole:
        raise _unsupported(f"{source}: {arch}", "rope.dimension_count", rotated)


def _head_dim(own: Mapping[str, object]) -> object:
    hidden, heads = own.get("embedding_length"), own.get("attention.head_count")
    if "attention.key_length" in own or not isinstance(hidden, int) or not isinstance(heads, int):
        return own.get("attention.key_length")
    return hidden // heads if heads > 0 else None


def _unsupported(where: str, key: str, value: object) -> UnsupportedModel:
    return UnsupportedModel(
        f"{where}.{key} {brief(value)} is not supported",
        hint="use another model, or an export without it",
    )


def _rope_scaling(
    own: Mapping[str, object], where: str, rope_factors: Mapping[str, Sequence[float]] | None
) -> object:
    """The `rope_scaling` object; a factor without a type is linear, and one of 0 is none.

    llama.cpp multiplies what is rotated by `attn_factor`, and YaRN by its own magnitude besides.
    """
    key = "rope.scaling.factor"
    factor = own.get(key, own.get("rope.scale_linear")) or 1.0
    kind = own.get("rope.scaling.type", "longrope" if rope_factors else "linear")
    attn_factor = own.get("rope.scaling.attn_factor", 1.0)
    original = own.get("rope.scaling.original_context_length", own.get("context_length"))
    stretched: dict[str, object] = {"rope_type": kind, "original_max_position_embeddings": original}
    if kind == "longrope":
        if factor != 1.0:
            raise _unsupported(where, key, factor)
        factors = rope_factors or {}
        return stretched | {
            "attention_factor": attn_factor,
            "long_factor": factors.get(ROPE_LONG),
            "short_factor": factors.get(ROPE_SHORT),
        }
    if kind == "yarn":
        yarn_factor = own.get("rope.scaling.yarn_attn_factor")
        if attn_factor != 1.0 and yarn_factor is None:
            yarn_factor = 0.1 * math.log(max(1.0, _number(factor))) + 1.0
        if yarn_factor is not None:
            stretched["attention_factor"] = _number(attn_factor) * _number(yarn_factor)
        for name in ("beta_fast", "beta_slow"):
            stretched[name] = own.get(f"rope.scaling.yarn_{name}")
        return stretched | {"factor": factor}
    if attn_factor != 1.0:
        raise _unsupported(where, "rope.scaling.attn_factor", attn_factor)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    return {"rope_type": kind, "factor": factor}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _gemma3(fields: dict[str, object], own: Mapping[str, object]) -> None:
    fields["norm_offset"] = 0.0  # the converter has added the 1
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    fields["query_pre_attn_scalar"] = _head_dim(own)
    # The 27B model scales by width per head.
    if fields["num_hidden_layers"] == 62 and isinstance(hidden, int) and isinstance(heads, int):
        fields["query_pre_attn_scalar"] = hidden / heads if heads else None
    if not own.get("attention.sliding_window"):
        fields["sliding_window_pattern"] = 1  # every layer sees everything
        return
    fields["sliding_window"] = own["attention.sliding_window"]
    fields["rope_local_base_freq"] = own.get("rope.freq_base_swa", 10_000.0)
    pattern = own.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        fields["layer_types"] = ["sliding_attention" if x else "full_attention" for x in pattern]
    else:
        fields["sliding_window_pattern"] = pattern


def _openelm(fields: dict[str, object], own: Mapping[str, object], source: str) -> None:
    widths, dim = own.get("feed_forward_length"), fields["model_dim"]
    if not isinstance(widths, list) or not isinstance(dim, int) or dim < 1:
        raise CheckpointCorrupt(f"{source}: openelm.feed_forward_length is missing")
    fields["ffn_dim_divisor"] = 1
    fields["ffn_multipliers"] = [width / dim for width in widths]


def row_order(arch: str, slot: str, layer: LayerConfig) -> np.ndarray | None:
    """The order that undoes how the converter permuted the rows of a layer's tensor, if it did.

    "llama" files keep rotary pairs (2i, 2i+1); this runtime and Hugging Face keep (i, i + half).
    """
    if arch != "llama" or slot not in ("attn_q", "attn_k"):
        return None
    heads = layer.num_heads if slot == "attn_q" else layer.num_kv_heads
    rows = np.arange(heads * layer.head_dim).reshape(heads, layer.head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)
