"""Configurations that are damaged or of what edgekv does not run: refused by field and file."""

from typing import Any

import pytest
from published_families import published_family

from edgekv.errors import CheckpointCorrupt, ModelError, UnsupportedModel
from edgekv.models.config import Fields
from edgekv.models.families import parse_config

QWEN3_MOE = "Qwen/Qwen3-30B-A3B"
MIXTRAL = "mistralai/Mixtral-8x7B-Instruct-v0.1"
GPT_OSS = "openai/gpt-oss-20b"
GEMMA2 = "google/gemma-2-2b-it"
GEMMA4 = "google/gemma-4-E2B-it"
GEMMA4_MOE = "google/gemma-4-26B-A4B-it"
QWEN3_5 = "Qwen/Qwen3.5-0.8B"
QWEN3_5_MOE = "Qwen/Qwen3.5-35B-A3B"
QWEN3_NEXT = "Qwen/Qwen3-Next-80B-A3B-Instruct"
GLM = "zai-org/GLM-4.7-Flash"
MINISTRAL = "mistralai/Ministral-3-3B-Instruct-2512"
PHI = "microsoft/Phi-4-mini-instruct"
SMOLLM3 = "HuggingFaceTB/SmolLM3-3B"
GRANITE = "ibm-granite/granite-3.3-8b-instruct"
OLMO3 = "allenai/Olmo-3-7B-Instruct"
LFM2 = "LiquidAI/LFM2-1.2B"

_FULL = "full_attention"

# What a file may say that edgekv does not run, by what the refusal names.
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    # Kinds of layers.
    (QWEN3_5, {"layer_types": ["mamba"] * 24}, "layer_types is"),
    (QWEN3_5, {"layer_types": ["sliding_attention"] * 24}, "layer_types is"),
    (QWEN3_NEXT, {"layer_types": [_FULL] * 47}, "layer_types is"),
    (GEMMA4, {"layer_types": ["chunked_attention"] * 35}, "layer_types is"),
    (GEMMA4, {"layer_types": [_FULL] * 34 + ["sliding_attention"]}, "end with sliding_attention"),
    (GPT_OSS, {"layer_types": [[]] * 24}, "layer_types is"),
    (OLMO3, {"layer_types": {"0": _FULL}}, "layer_types is"),
    (LFM2, {"layer_types": ["mamba"] * 16}, "layer_types is"),
    (LFM2, {"layer_types": ["conv"] * 16}, "layer_types"),
    (LFM2, {"full_attn_idxs": []}, "layer_types"),
    (GLM, {"mlp_layer_types": ["moe"] * 47}, "mlp_layer_types is"),
    (GLM, {"mlp_layer_types": ["dense"]}, "mlp_layer_types is"),
    (MIXTRAL, {"layer_types": ["sliding_attention"] * 32}, "layer_types .* of a mixtral"),
    (PHI, {"layer_types": [_FULL] * 32}, "layer_types .* of a phi3"),
    (SMOLLM3, {"layer_types": ["sliding_attention"] * 36}, "layer_types .* without a window"),
    # Routers.
    (GLM, {"topk_method": "greedy"}, "topk_method 'greedy'"),
    (GLM, {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
    (QWEN3_5_MOE, {"norm_topk_prob": False}, "norm_topk_prob False"),
    (QWEN3_5, {"num_experts": 8}, "num_experts 8"),
    (GPT_OSS, {"num_experts": 8}, "num_local_experts 32"),
    # Ropes.
    (GLM, {"rope_scaling": {"rope_type": "su", "factor": 2.0}}, "rope_scaling: rope_type 'su'"),
    (GLM, {"rope_interleave": False}, "rope_interleave False"),
    (QWEN3_5, {"rope_parameters": {"rope_type": "3d"}}, "rope_parameters: rope_type '3d'"),
    (
        GEMMA4,
        {"rope_parameters": {_FULL: {"rope_type": "axial", "rope_theta": 1e4}}},
        "rope_parameters: full_attention: rope_type 'axial'",
    ),
    (GEMMA4, {"rope_parameters": {"rope_type": "default"}}, "rope_parameters {'rope_type'"),
    (GEMMA4, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling {"),
    (OLMO3, {"rope_scaling": {"type": "yarn", "factor": 8.0}}, "rope_scaling: type 'yarn'"),
    (OLMO3, {"rope_theta": 10_000.0}, "rope_theta 10000.0"),
    (GRANITE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    # What else changes the result.
    (GPT_OSS, {"swiglu_limit": 10.0}, "swiglu_limit 10.0"),
    (GEMMA4, {"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
    (GEMMA4, {"per_layer_config": {"3": {"num_attention_heads": 2}}}, "'num_attention_heads' of"),
    (GLM, {"q_lora_rank": None, "attention_bias": True}, "attention_bias True"),
    (GLM, {"head_dim": 256}, "head_dim 256"),
    (LFM2, {"head_dim": 128}, "head_dim 128"),
    (QWEN3_5, {"attn_output_gate": False}, "attn_output_gate False"),
]
# What no model has.
CORRUPT: list[tuple[str, dict[str, Any], str]] = [
    # Experts.
    (QWEN3_MOE, {"num_experts_per_tok": 129}, "'num_experts_per_tok' is 129"),
    (QWEN3_MOE, {"num_experts": 4}, "'num_experts_per_tok' is 8"),
    (QWEN3_MOE, {"num_experts": 0}, "'num_experts' is 0"),
    (QWEN3_MOE, {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
    (QWEN3_MOE, {"mlp_only_layers": [48]}, r"'mlp_only_layers' is \[48\]"),
    (QWEN3_MOE, {"moe_intermediate_size": None}, "'moe_intermediate_size' is missing"),
    (MIXTRAL, {"num_local_experts": 1 << 20}, "'num_local_experts' is 1048576"),
    (GEMMA4_MOE, {"top_k_experts": 129}, "'top_k_experts' is 129"),
    (GEMMA4_MOE, {"num_experts": None}, "'num_experts' is missing"),
    (GLM, {"n_group": 3}, "n_group is 3"),
    (GLM, {"n_group": 64}, "n_group is 64"),
    (GLM, {"n_group": 8, "topk_group": 9}, "'topk_group' is 9"),
    (GLM, {"n_group": 32, "topk_group": 1}, "num_experts_per_tok is 4"),
    (GLM, {"routed_scaling_factor": 0}, "'routed_scaling_factor' is 0"),
    # Shared keys and values.
    (GEMMA4, {"num_kv_shared_layers": 35}, "'num_kv_shared_layers' is 35"),
    (GEMMA4, {"num_kv_shared_layers": 31}, "'num_kv_shared_layers' is 31"),  # no global one is left
    (GEMMA4, {"num_kv_shared_layers": -1}, "'num_kv_shared_layers' is -1"),
    # Windows.
    *((name, {"sliding_window": 0}, "'sliding_window' is 0") for name in (GPT_OSS, GEMMA2, OLMO3)),
    *((name, {"sliding_window": 0}, "'sliding_window' is 0") for name in (GEMMA4, PHI, MIXTRAL)),
    (MINISTRAL, {"sliding_window": 0}, "'sliding_window' is 0"),
    (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 0}, "'sliding_window' is 0"),
    (GPT_OSS, {"sliding_window": None}, "'sliding_window' is missing"),
    # Sizes that do not divide, or cannot be rotated.
    (QWEN3_MOE, {"num_key_value_heads": 5}, "32 query heads .* 5 key-value heads"),
    (GEMMA4_MOE, {"num_global_key_value_heads": 3}, "16 query heads .* 3 key-value heads"),
    # What would take gigabytes before a tensor is looked at.
    (QWEN3_5, {"num_attention_heads": 1 << 24}, "16777216 query heads .* are wider"),
    (QWEN3_NEXT, {"linear_value_head_dim": 1 << 24}, "in place of them, are wider"),
    (GPT_OSS, {"head_dim": 1 << 24}, "heads of size 16777216"),
    (GLM, {"qk_rope_head_dim": 1 << 24}, "heads of size 16777216"),
    (QWEN3_5, {"linear_num_value_heads": 24}, "'linear_num_value_heads' is 24"),
    (QWEN3_5, {"linear_conv_kernel_dim": 1}, "'linear_conv_kernel_dim' is 1"),
    (LFM2, {"conv_L_cache": 1}, "'conv_L_cache' is 1"),
    (LFM2, {"full_attn_idxs": [16]}, "'full_attn_idxs' is"),
    (GLM, {"qk_rope_head_dim": 63}, "heads of size 63"),
    (GLM, {"kv_lora_rank": 0}, "'kv_lora_rank' is 0"),
    (PHI, {"partial_rotary_factor": 0.18}, "'partial_rotary_factor' is 0.18"),
    (
        GEMMA4,
        {"rope_parameters": {_FULL: {"rope_type": "proportional", "partial_rotary_factor": 1e9}}},
        r"full_attention: field 'partial_rotary_factor' is 1e\+09",
    ),
    (PHI, {"partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5"),
    (PHI, {"partial_rotary_factor": 1.0}, "'short_factor' is"),
    (SMOLLM3, {"no_rope_layers": [1] * 35}, "'no_rope_layers' is"),
    (SMOLLM3, {"no_rope_layers": [[]] * 36}, "'no_rope_layers' is"),
    (SMOLLM3, {"no_rope_layers": [2] * 36}, "'no_rope_layers' is"),
    (SMOLLM3, {"no_rope_layers": None, "no_rope_layer_interval": 0}, "'no_rope_layer_interval'"),
    (QWEN3_NEXT, {"full_attention_interval": 0}, "'full_attention_interval' is 0"),
    # Tables and factors.
    (GEMMA4, {"vocab_size_per_layer_input": 262_143}, "'vocab_size_per_layer_input' is 262143"),
    (GEMMA4, {"per_layer_config": {"35": {"head_dim": 8}}}, "per_layer_config: no layer '35'"),
    (GEMMA4, {"per_layer_config": {"-1": {"head_dim": 8}}}, "per_layer_config: no layer '-1'"),
    (GEMMA4, {"per_layer_config": {"9" * 5000: {}}}, "per_layer_config: no layer '999"),
    (GEMMA4, {"per_layer_config": {"30": {"num_key_value_heads": 2}}}, "'num_kv_shared_layers' is"),
    (GEMMA4, {"per_layer_config": {"3": {"head_dim": 0}}}, "3: field 'head_dim' is 0"),
    (GEMMA4, {"per_layer_config": {"3": 8}}, "'3' is 8"),
    (GEMMA2, {"attn_logit_softcapping": 0.0}, "'attn_logit_softcapping' is 0.0"),
    (GRANITE, {"logits_scaling": 0}, "'logits_scaling' is 0"),
    (
        MINISTRAL,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 0,
            }
        },
        "'original_max_position_embeddings' is 0",
    ),
]


def parse_changed(name: str, change: dict[str, Any]) -> None:
    config = published_family(name)
    changed = config.get("text_config", config) | change
    raw = config | {"text_config": changed} if "text_config" in config else changed
    parse_config(Fields(raw, "folder/config.json"))


@pytest.mark.parametrize(
    ("error", "name", "change", "message"),
    [
        *((UnsupportedModel, *case) for case in UNSUPPORTED),
        *((CheckpointCorrupt, *case) for case in CORRUPT),
    ],
)
def test_it_is_refused_by_field_and_file(error, name, change, message):
    with pytest.raises(error, match=message) as e:
        parse_changed(name, change)
    assert str(e.value).startswith("folder/config.json: ")
    if "text_config" in published_family(name) and "heads" not in message:
        assert "text_config: " in str(e.value)
    assert e.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_config": None}, "a mistral3 without text_config"),
        ({"text_config": {"model_type": "llama"}}, "text_config: model_type 'llama'"),
        ({"text_config": []}, r"'text_config' is \[\]"),
    ],
)
def test_a_multimodal_whole_without_a_known_text_part(change, message):
    with pytest.raises(ModelError, match=message):
        parse_config(Fields(published_family(MINISTRAL) | change, "config.json"))


def test_an_mlp_is_never_without_width():
    """Of LFM2's, whose width is computed: none would be an MLP that is left out."""
    config = published_family(LFM2) | {"block_ff_dim": 1, "block_ffn_dim_multiplier": 1e-9}
    parsed = parse_config(Fields(config, "folder/config.json"))
    assert parsed.layers[0].ffn_size == config["block_multiple_of"]
