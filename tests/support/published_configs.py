"""Public configurations of the families that README lists.

Names and settings are those of the `config.json` files on Hugging Face, less their dtype and what
has no effect; what a model's card says is to be added for long texts is added. Sizes that
`published_models` scales may be those of another model of the family.
"""

from typing import Any

from hypothesis import strategies as st

from edgekv.models.rope_scaling import KINDS

Config = dict[str, Any]

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
}
_LLAMA3: Config = _LLAMA | {
    "vocab_size": 128256,
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
}
_YARN_4: Config = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

# By what `small` divides tokens, and the published settings.
PUBLISHED: dict[str, tuple[int, Config]] = {
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
            "intermediate_size": 8192,
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
            "intermediate_size": 4864,
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
            "vocab_size": 32000,
        },
    ),
}


def published(name: str) -> Config:
    """The settings of a model, whole."""
    return PUBLISHED[name][1]


_ROPE_FIELDS = (
    "type",
    "rope_type",
    "factor",
    "rope_theta",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "full_attention",
    "sliding_attention",
)
# Of any field, for fuzzers.
ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([0, -1, 0.0, 1e-9, 1 << 70, 10**400, 2.0, *KINDS, "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(_ROPE_FIELDS), inner, max_size=6)
    ),
    max_leaves=8,
)
