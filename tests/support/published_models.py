"""Public configurations of the families that README lists, made small.

Names and settings are those of the `config.json` files on Hugging Face, less what has no effect;
what a model's card says is to be added for long texts is added. `small` keeps every setting, and
scales what is a size: few and narrow layers, and contexts and windows divided so that a text of
`NUM_TOKENS` goes beyond them.

What transformers computes for them is in `tests/oracle/published.npz`; the script beside it says
how it was made.
"""

import pathlib
from typing import Any

import numpy as np
from tiny_models import Config, Tensors, random_tensors, write_folder

NUM_TOKENS = 160
SEEN = (0, 1, 30, 47, 64, 97, 130, 159)  # positions whose logits are compared
VOCAB_SIZE = 96
ORACLE_FILE = pathlib.Path(__file__).parents[1] / "oracle" / "published.npz"

_LLAMA: Config = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_LLAMA3: Config = _LLAMA | {
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
_MISTRAL: Config = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_QWEN2: Config = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
_QWEN3: Config = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
_GEMMA3: Config = {
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "float32",
}
_YARN_4: Config = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

# By what tokens are divided, and the published settings.
_PUBLISHED: dict[str, tuple[int, Config]] = {
    "meta-llama/Llama-2-7b-hf": (16, _LLAMA),
    "meta-llama/Meta-Llama-3-8B": (
        32,
        _LLAMA3 | {"rope_scaling": None, "max_position_embeddings": 8192},
    ),
    "meta-llama/Llama-3.1-8B": (128, _LLAMA3),
    "meta-llama/Llama-3.2-1B": (
        128,
        _LLAMA3
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "rope_scaling": _LLAMA3["rope_scaling"] | {"factor": 32.0},
            "tie_word_embeddings": True,
        },
    ),
    "HuggingFaceTB/SmolLM2-135M": (
        16,
        _LLAMA
        | {
            "hidden_size": 576,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "rope_theta": 100000,
            "rope_interleaved": False,
            "tie_word_embeddings": True,
        },
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        8,
        _LLAMA | {"hidden_size": 2048, "num_key_value_heads": 4, "max_position_embeddings": 2048},
    ),
    "deepseek-ai/deepseek-coder-6.7b-instruct": (
        64,
        _LLAMA
        | {
            "max_position_embeddings": 16384,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "rope_theta": 100000,
            "rms_norm_eps": 1e-6,
        },
    ),
    "hfl/chinese-alpaca-2-13b-16k": (
        64,
        _LLAMA
        | {
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "max_position_embeddings": 16384,
            "num_attention_heads": 40,
            "num_hidden_layers": 40,
            "num_key_value_heads": 40,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
        },
    ),
    "NousResearch/Yarn-Llama-2-7b-64k": (
        128,
        _LLAMA
        | {
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "type": "yarn",
                "finetuned": True,
            },
        },
    ),
    "mistralai/Mistral-7B-v0.1": (128, _MISTRAL),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        128,
        _MISTRAL | {"rope_theta": 1000000.0, "sliding_window": None},
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": (
        128,
        _MISTRAL
        | {
            "head_dim": 128,
            "hidden_size": 5120,
            "max_position_embeddings": 131072,
            "num_hidden_layers": 40,
            "rope_theta": 1000000.0,
            "sliding_window": None,
        },
    ),
    "Qwen/Qwen2-0.5B": (
        512,
        _QWEN2
        | {
            "hidden_size": 896,
            "max_position_embeddings": 131072,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen2.5-7B-Instruct, long texts": (512, _QWEN2 | {"rope_scaling": _YARN_4}),
    "Qwen/Qwen2.5-1.5B-Instruct, as transformers 5 saves it": (
        128,
        {
            "model_type": "qwen2",
            "dtype": "float32",
            "hidden_act": "silu",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "layer_types": ["full_attention"] * 28,
            "max_position_embeddings": 32768,
            "max_window_layers": 21,
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        128,
        _QWEN2
        | {
            "hidden_size": 1536,
            "max_position_embeddings": 131072,
            "max_window_layers": 21,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "rope_theta": 10000,
            "sliding_window": 4096,
            "use_mrope": False,
        },
    ),
    "Qwen/Qwen3-0.6B": (256, _QWEN3),
    "Qwen/Qwen3-8B, long texts": (
        512,
        _QWEN3
        | {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "max_window_layers": 36,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
            },
            "tie_word_embeddings": False,
        },
    ),
    "google/gemma-3-1b-it": (16, _GEMMA3),
    "google/gemma-3-270m": (
        16,
        {name: value for name, value in _GEMMA3.items() if name != "sliding_window_pattern"}
        | {
            "hidden_size": 640,
            "num_hidden_layers": 18,
            "_sliding_window_pattern": 6,
            "use_bidirectional_attention": False,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        },
    ),
    "google/gemma-3-4b-it": (
        32,
        {
            "model_type": "gemma3",
            "mm_tokens_per_image": 256,
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "model_type": "gemma3_text",
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "float32",
        },
    ),
    "google/gemma-3-27b-it": (
        32,
        {
            "model_type": "gemma3",
            "text_config": {
                "head_dim": 128,
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "model_type": "gemma3_text",
                "num_attention_heads": 32,
                "num_hidden_layers": 62,
                "num_key_value_heads": 16,
                "query_pre_attn_scalar": 168,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "torch_dtype": "float32",
        },
    ),
    "apple/OpenELM-270M": (
        16,
        {
            "model_type": "openelm",
            "activation_fn_name": "swish",
            "ffn_dim_divisor": 256,
            "ffn_multipliers": [0.5, 1.67, 4.0],
            "ffn_with_glu": True,
            "head_dim": 64,
            "max_context_length": 2048,
            "model_dim": 1280,
            "normalization_layer_name": "rms_norm",
            "normalize_qk_projections": True,
            "num_kv_heads": [3, 4, 5],
            "num_query_heads": [12, 16, 20],
            "num_transformer_layers": 3,
            "rope_freq_constant": 10000,
            "rope_max_length": 4096,
            "share_input_output_layers": True,
        },
    ),
}

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

NAMES = (*_PUBLISHED, *_MADE_UP)


def small(name: str) -> Config:
    """The configuration of a name, scaled down."""
    if name in _MADE_UP:
        return _BASE | _MADE_UP[name]
    unit, published = _PUBLISHED[name]
    if published["model_type"] == "openelm":
        sizes = {"head_dim": 16, "model_dim": 64, "ffn_dim_divisor": 16, "vocab_size": VOCAB_SIZE}
        return published | sizes
    if "text_config" in published:
        return published | {"text_config": _small_text(published["text_config"], unit)}
    return _small_text(published, unit)


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
