"""The tiny models of `tiny_models` as GGUF files, converted as llama.cpp's converter does it.

That means: its tensor names, query and key rows of "llama" permuted for interleaved rotary pairs,
Gemma's norm weights with 1 added, OpenELM's fused MLP cut in two, Llama 3's rope scaling as the
tensor `rope_freqs.weight`.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tiny_models import (
    BOS_ID,
    CHAT_TEMPLATE,
    TURN_END_ID,
    Tensors,
    openelm_ffn_sizes,
    random_tensors,
    tiny_tokenizer_json,
)

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.token_embeddings": "token_embd",
    "transformer.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn.qkv_proj": "attn_qkv",
    "attn.out_proj": "attn_output",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "ffn.proj_2": "ffn_down",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def architecture(config: Mapping[str, Any]) -> str:
    """What GGUF calls the family of a configuration."""
    return "gemma3" if config["model_type"] == "gemma3_text" else str(config["model_type"])


def write_gguf(
    path: pathlib.Path,
    config: Mapping[str, Any],
    *,
    tensors: Tensors | None = None,
    kind: Kind = Kind.F32,
    metadata: Mapping[str, Any] | None = None,
) -> Tensors:
    """Write a GGUF file, tokenizer and chat template included.

    Args:
        path: The file.
        config: See `tiny_models.tiny_config`.
        tensors: Weights by Hugging Face name; None draws them.
        kind: How matrices are stored; vectors are F32.
        metadata: More keys, or other values for keys; None leaves a key out.

    Returns:
        The weights by Hugging Face name as they read after storing.
    """
    tensors = random_tensors(config) if tensors is None else tensors
    stored = {name: _round_trip(values, kind) for name, values in tensors.items()}
    writer = gguf.GGUFWriter(path, architecture(config))
    fields = _model_fields(config) | tokenizer_fields() | dict(metadata or {})
    for key, value in fields.items():
        add_field(writer, key, value)
    for name, values in _converted(config, tensors).items():
        if values.ndim == 1 or kind == Kind.F32:
            writer.add_tensor(name, values.astype(np.float32))
        elif kind == Kind.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return stored


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _round_trip(values: np.ndarray, kind: Kind) -> np.ndarray:
    if values.ndim == 1:
        return values
    return gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind).astype(np.float32)


def _converted(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    arch = architecture(config)
    names = _NAMES | (
        _GEMMA_NAMES if arch == "gemma3" else {"post_attention_layernorm": "ffn_norm"}
    )
    converted: Tensors = {}
    for name, values in tensors.items():
        stem, _, suffix = name.rpartition(".")
        prefix = ""
        if ".layers." in stem:
            layer, _, stem = stem.split(".layers.")[1].partition(".")
            prefix = f"blk.{layer}."
        if stem == "ffn.proj_1":
            gate, up = np.split(values, 2)
            converted |= {f"{prefix}ffn_gate.weight": gate, f"{prefix}ffn_up.weight": up}
            continue
        if arch == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config[f"num_{'attention' if '.q_' in stem else 'key_value'}_heads"]
            values = interleaved(values, heads)
        if arch == "gemma3" and stem.endswith("norm"):
            values = values + 1
        converted[f"{prefix}{names[stem]}.{suffix}"] = values
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "llama3":
        converted["rope_freqs.weight"] = _wavelength_factors(config)
    if scaling.get("rope_type") == "longrope":
        for length in ("long", "short"):
            factors = np.array(scaling[f"{length}_factor"], np.float32)
            converted[f"rope_factors_{length}.weight"] = factors
    return converted


def interleaved(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from halves (i, i + half) to pairs (2i, 2i + 1)."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _wavelength_factors(config: Mapping[str, Any]) -> np.ndarray:
    scaling = config["rope_scaling"]
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    context = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * config["rope_theta"] ** (i / head_dim)
        smooth = min(1.0, max(0.0, (context / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _model_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    arch = architecture(config)
    if arch == "openelm":
        fields = {
            "embedding_length": config["model_dim"],
            "block_count": config["num_transformer_layers"],
            "feed_forward_length": openelm_ffn_sizes(config),
            "attention.head_count": config["num_query_heads"],
            "attention.head_count_kv": config["num_kv_heads"],
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
            "context_length": config["max_context_length"],
            "rope.freq_base": config["rope_freq_constant"],
        }
    else:
        fields = {
            "embedding_length": config["hidden_size"],
            "block_count": config["num_hidden_layers"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": config["num_attention_heads"],
            "attention.head_count_kv": config["num_key_value_heads"],
            "attention.key_length": config.get("head_dim"),
            "attention.value_length": config.get("head_dim"),
            "attention.sliding_window": config.get("sliding_window"),
            "context_length": config["max_position_embeddings"],
            "rope.freq_base": config["rope_theta"],
        }
    fields |= {
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
    }
    scaling = config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind in ("linear", "yarn", "longrope"):
        fields |= {
            "rope.scaling.type": kind,
            "rope.scaling.factor": scaling.get("factor"),
            "rope.scaling.original_context_length": scaling.get("original_max_position_embeddings"),
            "rope.scaling.yarn_beta_fast": scaling.get("beta_fast"),
            "rope.scaling.yarn_beta_slow": scaling.get("beta_slow"),
        }
    if kind == "longrope":  # the converter writes what the reader would have to work out
        fields["rope.scaling.attn_factor"] = scaling["attention_factor"]
    elif kind == "yarn":
        fields["rope.scaling.yarn_attn_factor"] = scaling.get("attention_factor")
    return {f"{arch}.{name}": value for name, value in fields.items()}


def tokenizer_fields() -> dict[str, Any]:
    """Keys of the tiny tokenizer."""
    spec = json.loads(tiny_tokenizer_json())
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    control = {token["id"] for token in spec["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in spec["model"]["merges"]
        ],
        "tokenizer.ggml.bos_token_id": BOS_ID,
        "tokenizer.ggml.eos_token_id": TURN_END_ID,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key of the type that its value has; None is none."""
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
