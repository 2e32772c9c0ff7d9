"""Public configurations made small, and some of no model, as folders.

`small` keeps every setting, and scales what is a size: few and narrow layers, and contexts and
windows divided so that a text of `NUM_TOKENS` goes beyond them.

What transformers computes for them is in `tests/oracle/published.npz`; the script beside it says
how it was made.
"""

import pathlib
from typing import Any

import numpy as np
from published_configs import PUBLISHED
from tiny_models import Config, Tensors, random_tensors, write_folder

NUM_TOKENS = 160
SEEN = (0, 1, 30, 47, 64, 97, 130, 159)  # positions whose logits are compared
VOCAB_SIZE = 96
ORACLE_FILE = pathlib.Path(__file__).parents[1] / "oracle" / "published.npz"

# Of no model that we know of; settings that transformers has besides.
_LONGROPE: Config = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.05 * i for i in range(8)],
    "long_factor": [1.0 + 0.9 * i for i in range(8)],
}
_MADE_UP: dict[str, Config] = {
    "llama, longrope": {"rope_scaling": _LONGROPE, "original_max_position_embeddings": 32},
    "llama, longrope, attention_factor": {
        "rope_parameters": _LONGROPE
        | {"attention_factor": 1.3, "original_max_position_embeddings": 32, "rope_theta": 5000.0}
    },
    "llama, dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama, yarn of all fields": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 1.2,
            "mscale_all_dim": 0.7,
            "truncate": False,
        }
    },
    "llama, left-over sliding_window": {"sliding_window": 24},
    "llama, biases": {"attention_bias": True, "mlp_bias": True},
    "mistral, layer_types": {
        "model_type": "mistral",
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "mistral, default window": {"model_type": "mistral", "attention_bias": True},
    "qwen2, upper windows": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 2,
    },
    "qwen3, upper windows, biases": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 24,
        "max_window_layers": 1,
        "attention_bias": True,
        "head_dim": 16,
    },
    "qwen2, gelu": {"model_type": "qwen2", "hidden_act": "gelu_pytorch_tanh"},
    "gemma3, yarn by kind, biases, silu": {
        "model_type": "gemma3_text",
        "attention_bias": True,
        "hidden_activation": "silu",
        "head_dim": 16,
        "sliding_window": 24,
        "sliding_window_pattern": 3,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 200000.0,
            },
            "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
        },
    },
    "llama, tied and another head": {"tie_word_embeddings": True},
}
_BASE: Config = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB_SIZE,
    "torch_dtype": "float32",
}

NAMES = (*PUBLISHED, *_MADE_UP)


def small(name: str) -> Config:
    """The configuration of a name, scaled down."""
    if name in _MADE_UP:
        return _BASE | _MADE_UP[name]
    unit, config = PUBLISHED[name]
    config = {"torch_dtype": "float32"} | config if "dtype" not in config else config
    if config["model_type"] == "openelm":
        sizes = {"head_dim": 16, "model_dim": 64, "ffn_dim_divisor": 16, "vocab_size": VOCAB_SIZE}
        return config | sizes
    if "text_config" in config:
        return config | {"text_config": _small_text(config["text_config"], unit)}
    return _small_text(config, unit)


def _small_text(config: Config, unit: int) -> Config:
    gemma = config["model_type"] == "gemma3_text"
    group = config.get("num_attention_heads", 8) // config.get("num_key_value_heads", 4)
    kv_heads = 2 if group < 4 else 1
    heads = kv_heads * min(group, 4)
    layers = 7 if gemma else 4
    out = config | {
        "hidden_size": heads * (12 if "head_dim" in config or gemma else 16),
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": VOCAB_SIZE,
    }
    if "head_dim" in config or gemma:
        out["head_dim"] = 16
        scalar = config.get("query_pre_attn_scalar", 256) * 16 / config.get("head_dim", 256)
        out |= {"query_pre_attn_scalar": int(scalar)} if gemma else {}
    for field in ("max_position_embeddings", "sliding_window"):
        if config.get(field):
            out[field] = config[field] // unit
    if "max_window_layers" in config:
        out["max_window_layers"] = (
            config["max_window_layers"] * layers // config["num_hidden_layers"]
        )
    if "layer_types" in config:
        out["layer_types"] = config["layer_types"][:layers]
    scaling = dict(config.get("rope_scaling") or {})
    if "original_max_position_embeddings" in scaling:
        scaling["original_max_position_embeddings"] //= unit
    return out | ({"rope_scaling": scaling} if scaling else {})


def text_tensors(config: Config) -> Tensors:
    """Weights by name, as a model of text alone has them."""
    text: dict[str, Any] = config.get("text_config", config)
    bias = text.get("attention_bias", False) and config["model_type"] != "mistral"
    return random_tensors(text | {"attention_bias": bias})


def write_small(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The model folder of a name; multimodal ones have the tensor names of transformers 4.52."""
    config = small(name)
    tensors = text_tensors(config)
    if "text_config" in config:
        tensors = {
            f"model.language_model.{key.removeprefix('model.')}": values
            for key, values in tensors.items()
        }
    if name == "llama, tied and another head":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    return write_folder(folder, config, tensors=tensors, tokenizer=False)


def text_ids() -> list[int]:
    """The tokens that every model is asked about."""
    return [int(i) for i in np.random.default_rng(7).integers(0, VOCAB_SIZE, NUM_TOKENS)]
