"""Tiny random models of the families whose tensors mlx-lm can name: any that it has.

    folder = write_family(tmp_path / "gpt_oss", FAMILY_CONFIGS["gpt_oss"])

They are saved under mlx-lm's names, as its converter would save them; see
`edgekv.bench.shaped_model`. Other layouts are made of these by the tests that are about them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from tiny_models import EOS_ID, TURN_END_ID, VOCAB_SIZE, write_folder

from edgekv.bench.shaped_model import random_tensors

Config = dict[str, Any]

_BASE: Config = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "bos_token_id": EOS_ID,
    "eos_token_id": TURN_END_ID,
}
_YARN: Config = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_DELTA: Config = {
    "full_attention_interval": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
}
_QWEN_EXPERTS: Config = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_LFM2: Config = {
    **_BASE,
    "model_type": "lfm2",
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 144,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": True,
    "tie_word_embeddings": True,
}
_GEMMA4: Config = {
    **_BASE,
    "model_type": "gemma4_text",
    "num_hidden_layers": 6,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "final_logit_softcapping": 30.0,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e6,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

FAMILY_CONFIGS: dict[str, Config] = {
    "qwen3_moe": {**_BASE, "model_type": "qwen3_moe", "head_dim": 32, **_QWEN_EXPERTS},
    "qwen3_moe, some dense": {
        **_BASE,
        "model_type": "qwen3_moe",
        "head_dim": 32,
        **_QWEN_EXPERTS,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "norm_topk_prob": False,
    },
    "mixtral": {
        **_BASE,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "gpt_oss": {
        **_BASE,
        "model_type": "gpt_oss",
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": _YARN,
    },
    "gemma2": {
        **_BASE,
        "model_type": "gemma2",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
        "tie_word_embeddings": True,
        # mlx-lm's Gemma 2 has no windows; a text that is shorter has none either.
        "sliding_window": 512,
    },
    "gemma4, shared": _GEMMA4,
    "gemma4, experts": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
    },
    "qwen3_5": {
        **_BASE,
        **_DELTA,
        "model_type": "qwen3_5",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
        },
    },
    "qwen3_5, experts": {
        **_BASE,
        **_DELTA,
        **_QWEN_EXPERTS,
        "model_type": "qwen3_5_moe",
        "shared_expert_intermediate_size": 40,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
    },
    "qwen3_next": {
        **_BASE,
        **_DELTA,
        **_QWEN_EXPERTS,
        "model_type": "qwen3_next",
        "partial_rotary_factor": 0.25,
        "shared_expert_intermediate_size": 40,
    },
    "glm4_moe_lite": {
        **_BASE,
        "model_type": "glm4_moe_lite",
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.8,
    },
    "glm4_moe_lite, plain queries": {
        **_BASE,
        "model_type": "glm4_moe_lite",
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "ministral3": {
        **_BASE,
        "model_type": "ministral3",
        "head_dim": 16,
        "sliding_window": None,
        "rope_parameters": {
            **_YARN,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.3,
            "rope_theta": 10_000.0,
        },
    },
    "mistral3": {
        "model_type": "mistral3",
        "vocab_size": VOCAB_SIZE,
        "text_config": {**_BASE, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
    },
    "phi3": {**_BASE, "model_type": "phi3", "partial_rotary_factor": 0.5},
    "phi3, longrope": {
        **_BASE,
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 256,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 6,
            "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.0],
        },
    },
    "smollm3": {**_BASE, "model_type": "smollm3"},
    "lfm2": {**_LFM2, "conv_bias": False},
    "lfm2, biases": {**_LFM2, "conv_bias": True, "conv_L_cache": 4},
    "granite": {
        **_BASE,
        "model_type": "granite",
        "logits_scaling": 0.5,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "olmo3": {
        **_BASE,
        "model_type": "olmo3",
        "rope_theta": 500_000.0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "rope_scaling": {**_YARN, "attention_factor": 1.1386294361119891},
    },
}


def write_family(
    folder: pathlib.Path, config: Mapping[str, Any], *, seed: int = 0, tokenizer: bool = True
) -> pathlib.Path:
    """Write a model folder as mlx-lm's converter would, and return it."""
    tensors = random_tensors(config, seed)
    return write_folder(folder, config, tensors=tensors, tokenizer=tokenizer)
