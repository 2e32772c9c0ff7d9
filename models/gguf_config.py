"""GGUF metadata → the same fields and names as the family's Hugging Face checkpoint.

Sources: the GGUF specification and llama.cpp's architecture tables. What llama.cpp's converter
changed in the numbers is said here too: query and key rows of "llama" files are permuted for
interleaved rotary pairs, and Gemma's norm weights already have their 1 added.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import LayerConfig
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


def to_hf_fields(metadata: Mapping[str, object], source: str) -> dict[str, object]:
    """The `config.json` that this file's metadata amounts to.

    Raises:
        UnsupportedModel: An architecture or rope scaling that edgekv does not run.
        CheckpointCorrupt: A field has a value of the wrong kind.
    """
    arch = metadata.get("general.architecture")
    if arch not in SUPPORTED:
        raise UnsupportedModel(
            f"{source}: GGUF architecture {arch!r} is not supported",
            hint="supported: " + ", ".join(SUPPORTED),
        )
    own = {key.removeprefix(f"{arch}."): value for key, value in metadata.items()}
    if own.get("expert_count"):
        raise UnsupportedModel(
            f"{source}: mixture-of-experts models are not supported", hint="use a dense model"
        )
    openelm = arch == "openelm"
    fields = {theirs if openelm else usual: own.get(key) for theirs, usual, key in _FIELDS}
    fields["model_type"] = "gemma3_text" if arch == "gemma3" else arch
    tokens = metadata.get("tokenizer.ggml.tokens")
    if fields["vocab_size"] is None and isinstance(tokens, list):
        fields["vocab_size"] = len(tokens)
    fields["sliding_window"] = own.get("attention.sliding_window")
    fields["rope_scaling"] = _rope_scaling(own, source)
    fields["partial_rotary_factor"] = _rotary_factor(fields, own)
    if arch == "gemma3":
        _gemma3(fields)
    if openelm:
        _openelm(fields, own, source)
    return fields


def _rope_scaling(own: Mapping[str, object], source: str) -> object:
    kind = own.get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": own.get("rope.scaling.factor")}
    raise UnsupportedModel(
        f"{source}: rope scaling {kind!r} is not supported",
        hint="supported in GGUF files: none, linear, and llama3 as rope_freqs.weight",
    )


def _rotary_factor(fields: Mapping[str, object], own: Mapping[str, object]) -> float | None:
    """The rotated part of a head, where the file says both sizes."""
    rotated, whole = own.get("rope.dimension_count"), fields.get("head_dim")
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if whole is None and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        whole = hidden // heads
    if not isinstance(rotated, int) or not isinstance(whole, int) or whole < 1:
        return None
    return rotated / whole


def _gemma3(fields: dict[str, object]) -> None:
    fields["norm_offset"] = 0.0  # the converter has added the 1
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    # The 27B model scales by width per head.
    if fields["num_hidden_layers"] == 62 and isinstance(hidden, int) and isinstance(heads, int):
        fields["query_pre_attn_scalar"] = hidden / heads if heads else None


def _openelm(fields: dict[str, object], own: Mapping[str, object], source: str) -> None:
    widths, dim = own.get("feed_forward_length"), fields["model_dim"]
    if not isinstance(widths, list) or not isinstance(dim, int) or dim < 1:
        raise CheckpointCorrupt(
            f"{source}: openelm.feed_forward_length is missing", hint="fetch the file again"
        )
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
