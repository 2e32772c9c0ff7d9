"""GGUF metadata → the same fields and names as the family's Hugging Face checkpoint.

What llama.cpp's converter changed in the numbers is undone here or where it is named: query and key
rows of some architectures are permuted for interleaved rotary pairs, and value heads of Qwen 3.5's
delta layers stand in turn (`row_order`); a delta layer's decay is minus the rate instead of its
logarithm (`LayerNames.delta_decay_is_rate`); norm weights of Gemma 2, Gemma 3 and of Qwen's models
with delta layers already have their 1 added.
"""

import math
from collections.abc import Collection, Mapping

import numpy as np

from edgekv.errors import UnsupportedModel
from edgekv.models.config import DeltaConfig, LayerConfig
from edgekv.models.families.names import TensorNames
from edgekv.models.gguf_architectures import ARCHITECTURES
from edgekv.models.gguf_derived import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from edgekv.models.gguf_keys import Keys

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

SUPPORTED = tuple(ARCHITECTURES)


def tensor_names(architecture: str) -> TensorNames:
    """Names of an architecture's tensors in a GGUF file."""
    return ARCHITECTURES[architecture].names


def field_names(architecture: str) -> dict[str, str]:
    """The keys of a GGUF file by the fields of a Hugging Face configuration."""
    keys = _MORE_NAMES | dict(ARCHITECTURES[architecture].fields)
    tensors = {"long_factor": ROPE_LONG, "short_factor": ROPE_SHORT}
    return {field: f"{architecture}.{key}" for field, key in keys.items()} | tensors


def to_hf_fields(
    metadata: Mapping[str, object],
    source: str,
    rope_factors: Mapping[str, list[float]] | None = None,
    tensors: Collection[str] = (),
) -> dict[str, object]:
    """The `config.json` that this file's metadata amounts to.

    Args:
        metadata: Of the file.
        source: What errors call it.
        rope_factors: What the tensors `ROPE_FREQS`, `ROPE_LONG` and `ROPE_SHORT` hold, if it has
            them.
        tensors: Names of its tensors.

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
    architecture = ARCHITECTURES[str(arch)]
    keys = Keys(metadata, str(arch), source, tensors, rope_factors)
    keys.refuse_unread(architecture.read)
    rotated = "rope.dimension_count"
    if rotated not in architecture.read and keys.get(rotated) not in (None, keys.head_dim):
        raise keys.unsupported(rotated)
    fields = {
        **{name: keys.get(key) for name, key in architecture.fields.items()},
        **architecture.fixed,
        "model_type": architecture.model_type,
        "rope_scaling": _rope_scaling(keys),
    }
    for name, key in architecture.fields.items():
        if key == "block_count":
            fields[name] = keys.num_layers
    architecture.settle(fields, keys)
    return fields


def rope_freqs_stretch(architecture: str) -> bool:
    """Whether `ROPE_FREQS` stretches the ropes of all layers, which to the fields is unknown."""
    return ARCHITECTURES[architecture].rope_freqs_stretch


def _rope_scaling(keys: Keys) -> dict[str, object] | None:
    """The `rope_scaling` object; a factor without a type is linear, and one of 0 is none.

    llama.cpp multiplies what is rotated by `attn_factor`, and YaRN by its own magnitude besides.
    """
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear")) or 1.0
    longrope = {name: keys.rope_factors.get(name) for name in (ROPE_LONG, ROPE_SHORT)}
    usual = "longrope" if any(longrope.values()) else "linear"
    kind = keys.get("rope.scaling.type", usual)
    attn_factor = keys.get("rope.scaling.attn_factor", 1.0)
    original = keys.get("rope.scaling.original_context_length", keys.get("context_length"))
    stretched: dict[str, object] = {"rope_type": kind, "original_max_position_embeddings": original}
    if kind == "longrope":
        if factor != 1.0:
            raise keys.unsupported("rope.scaling.factor")
        return stretched | {
            "attention_factor": attn_factor,
            "long_factor": longrope[ROPE_LONG],
            "short_factor": longrope[ROPE_SHORT],
        }
    if kind == "yarn":
        yarn_factor = keys.get("rope.scaling.yarn_attn_factor")
        if attn_factor != 1.0 and yarn_factor is None:
            yarn_factor = 0.1 * math.log(max(1.0, _number(factor))) + 1.0
        if yarn_factor is not None:
            stretched["attention_factor"] = _number(attn_factor) * _number(yarn_factor)
        for name in ("beta_fast", "beta_slow"):
            stretched[name] = keys.get(f"rope.scaling.yarn_{name}")
        return stretched | {"factor": factor}
    if attn_factor != 1.0:
        raise keys.unsupported("rope.scaling.attn_factor")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    return {"rope_type": kind, "factor": factor}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def row_order(arch: str, slot: str, layer: LayerConfig) -> np.ndarray | None:
    """The order that undoes how the converter permuted the rows of a layer's tensor, if it did.

    This runtime and Hugging Face keep rotary pairs (i, i + half), some files (2i, 2i + 1). Of
    `delta_out` it is the order of heads, which are its columns.
    """
    architecture = ARCHITECTURES.get(arch)
    if architecture is None:
        return None
    if architecture.side_by_side and slot in ("attn_q", "attn_k"):
        heads = layer.num_heads if slot == "attn_q" else layer.num_kv_heads
        return np.arange(heads * layer.head_dim).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if architecture.tiled_values and layer.delta is not None:
        return _untiled(slot, layer.delta)
    return None


def _untiled(slot: str, delta: DeltaConfig) -> np.ndarray | None:
    """Value heads by the key head that they share, of which the file takes each in turn.

    So ggml can repeat keys as a whole (`_LinearAttentionVReorderBase` of llama.cpp's converter).
    """
    turns = np.arange(delta.num_value_heads).reshape(-1, delta.num_key_heads)
    heads = turns.T.reshape(-1)
    if slot in ("ssm_beta", "ssm_alpha", "ssm_a", "ssm_dt.bias", "ssm_out"):
        return heads
    rows = (heads[:, None] * delta.value_dim + np.arange(delta.value_dim)).reshape(-1)
    if slot == "attn_gate":
        return rows
    if slot in ("attn_qkv", "ssm_conv1d"):
        keys = 2 * delta.num_key_heads * delta.key_dim
        return np.concatenate([np.arange(keys), keys + rows])
    return None


__all__ = [
    "ROPE_FREQS",
    "ROPE_LONG",
    "ROPE_SHORT",
    "SUPPORTED",
    "field_names",
    "rope_freqs_stretch",
    "row_order",
    "tensor_names",
    "to_hf_fields",
]
