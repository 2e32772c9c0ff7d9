"""Each family reads a configuration as transformers' own class does, field by field.

A field of such a class that is in none of the three tables below fails: somebody has to decide
whether it is read, refused or without effect.
"""

import contextlib
import importlib
import inspect
import json
from typing import Any

import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from published_families import PUBLISHED_FAMILIES, text_part

from edgekv.errors import EdgeKVError, UnsupportedModel
from edgekv.models.config import Fields
from edgekv.models.families import FAMILIES, parse_config

transformers = pytest.importorskip("transformers", minversion="5")
hf_configs = importlib.import_module("hf_configs")  # it needs transformers
CLASSES, copied = hf_configs.CLASSES, hf_configs.copied
ours, parsed, theirs = hf_configs.ours, hf_configs.parsed, hf_configs.theirs

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated")]

# Fields that decide something, with values to try; a list holds one value more each.
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
READ: dict[str, list[Any]] = {
    "vocab_size": [100],
    "hidden_size": [768],
    "intermediate_size": [99],
    "num_hidden_layers": [9],
    "num_attention_heads": [64],
    "num_key_value_heads": [None, 2],
    "head_dim": [None, 48],
    "hidden_act": ["swish", "gelu_pytorch_tanh"],
    "hidden_activation": ["silu"],
    "max_position_embeddings": [1234],
    "rms_norm_eps": [1e-3],
    "tie_word_embeddings": [True, False],
    "attention_bias": [True],
    "mlp_bias": [True],
    "use_sliding_window": [True],
    "sliding_window": [None, 64],
    "max_window_layers": [3],
    "query_pre_attn_scalar": [100],
    "final_logit_softcapping": [20.0, None],
    "attn_logit_softcapping": [20.0, None],
    # Mixtures of experts.
    "num_experts": [64],
    "num_local_experts": [64],
    "n_routed_experts": [32],
    "num_experts_per_tok": [3],
    "moe_intermediate_size": [333],
    "shared_expert_intermediate_size": [444],
    "n_shared_experts": [2],
    "norm_topk_prob": [True, False],
    "routed_scaling_factor": [2.5],
    "n_group": [],  # below
    "topk_group": [],
    "decoder_sparse_step": [2],
    "mlp_only_layers": [None, [], [0, 3]],
    "mlp_layer_types": [None, ["dense"] * 2 + ["sparse"] * 45],
    # Latent attention and Gated DeltaNet.
    "kv_lora_rank": [256],
    "q_lora_rank": [None, 99],
    "qk_nope_head_dim": [96],
    "qk_rope_head_dim": [32],
    "v_head_dim": [96],
    "linear_conv_kernel_dim": [3],
    "linear_key_head_dim": [64],
    "linear_value_head_dim": [64],
    "linear_num_key_heads": [8],
    "linear_num_value_heads": [48],
    # Gemma 4's.
    "vocab_size_per_layer_input": [300_000],
    "hidden_size_per_layer_input": [0, 64],
    "attention_k_eq_v": [True],
    "num_kv_shared_layers": [10],
    "use_double_wide_mlp": [True],
    "enable_moe_block": [],  # below
    "top_k_experts": [],
    # LFM2's.
    "norm_eps": [1e-3],
    "conv_bias": [True],
    "conv_L_cache": [4],
    "block_multiple_of": [100],
    "block_ffn_dim_multiplier": [1.5],
    "block_auto_adjust_ff_dim": [False],
    "full_attn_idxs": [None, [2, 5, 8]],
    # SmolLM3's, Granite's and Phi's.
    "no_rope_layers": [None, [1, 0] * 18],
    "no_rope_layer_interval": [3],
    "embedding_multiplier": [12.0],
    "logits_scaling": [8],
    "residual_multiplier": [0.22],
    "attention_multiplier": [0.0078125],
    "original_max_position_embeddings": [],  # below
    "layer_types": [],
    "rope_parameters": [],
}
NO_EFFECT: dict[str, Any] = {
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "pretraining_tp": 2,
    "attention_dropout": 0.1,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.1,
    "router_jitter_noise": 0.1,
}
REFUSED: dict[str, Any] = {
    "use_bidirectional_attention": True,
    "swiglu_alpha": 1.5,
    "swiglu_limit": 8.0,
    "rope_interleave": False,
}
# Read in other families, refused or without effect in these.
REFUSED_IN = {
    ("gemma3_text", "final_logit_softcapping"): 30.0,
    ("gemma3_text", "attn_logit_softcapping"): 50.0,
    ("gemma4_text", "use_bidirectional_attention"): "all",
}
ALONE_WITHOUT_EFFECT = {  # in Gemma 4: see TOGETHER
    ("gemma4_text", "num_experts"),
    ("gemma4_text", "moe_intermediate_size"),
}
# Where null is no value: transformers refuses it, or the model could not run. We take it for the
# sizes, as GGUF files leave them out.
NO_NULL = {
    *((f, "num_key_value_heads") for f in ("mistral", "mixtral", "ministral3", "gpt_oss")),
    *((f, "num_key_value_heads") for f in ("qwen3_moe", "qwen3_next", "glm4_moe_lite")),
    *((f, "num_key_value_heads") for f in ("qwen3_5_text", "qwen3_5_moe_text")),
    *((f, "num_key_value_heads") for f in ("gemma2", "gemma3_text", "gemma4_text")),
    *((f, "head_dim") for f in ("qwen3", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next")),
    *((f, "head_dim") for f in ("gemma2", "gemma3_text", "gemma4_text")),
    *((f, "head_dim") for f in ("gpt_oss", "ministral3")),
    ("lfm2", "num_key_value_heads"),
    *((f, "sliding_window") for f in ("gemma2", "gemma3_text", "gemma4_text")),
    *((f, "sliding_window") for f in ("gpt_oss", "olmo3")),
}
_LONGROPE = {"short_factor": [1.5] * 48, "long_factor": [3.0] * 48}
_DELTA = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
_SLIDING = ["sliding_attention", "full_attention"] * 3
# Several fields at once, for families by name.
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None}),
    ("qwen2", {"num_hidden_layers": 6, "use_sliding_window": True, "layer_types": _SLIDING}),
    ("mistral", {"num_hidden_layers": 6, "layer_types": _SLIDING, "head_dim": 64}),
    ("mistral", {"layer_types": None, "sliding_window": None}),
    ("mistral", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {"attention_bias": True, "mlp_bias": True, "query_pre_attn_scalar": 64}),
    ("llama", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}),
    ("gemma3_text", {"num_hidden_layers": 6, "layer_types": _SLIDING}),
    ("gemma3_text", {"sliding_window_pattern": 4, "num_hidden_layers": 9}),
    ("gemma3_text", {"rope_theta": 5000.0, "rope_local_base_freq": 6000.0}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 7000.0}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 60_000.0},
            }
        },
    ),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}),
    ("qwen3_moe", {"num_local_experts": 16}),
    ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": [2, 5]}),
    ("mixtral", {"num_experts": 16, "sliding_window": 64}),
    (
        "gpt_oss",
        {"num_experts": 16, "num_hidden_layers": 6, "layer_types": _SLIDING[1:] + _SLIDING[:1]},
    ),
    ("gpt_oss", {"rope_scaling": _YARN, "rope_theta": 7000.0}),
    ("qwen3_next", {"full_attention_interval": 3, "num_hidden_layers": 9}),
    ("qwen3_next", {"num_hidden_layers": 4, "layer_types": _DELTA}),
    ("qwen3_5_text", {"num_hidden_layers": 4, "layer_types": _DELTA}),
    ("qwen3_5_text", {"partial_rotary_factor": 0.5, "rope_theta": 7000.0}),
    (
        "qwen3_5_moe_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 7000.0,
                "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
                "mrope_section": [11, 11, 10],
            }
        },
    ),
    ("gemma2", {"num_hidden_layers": 6, "layer_types": _SLIDING}),
    ("gemma4_text", {"num_hidden_layers": 7}),
    ("gemma4_text", {"global_head_dim": 64, "num_global_key_value_heads": 2}),
    ("gemma4_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 2}),
    ("gemma4_text", {"num_kv_shared_layers": 20, "use_double_wide_mlp": True}),
    (
        "gemma4_text",
        {
            "enable_moe_block": True,
            "num_experts": 16,
            "top_k_experts": 3,
            "moe_intermediate_size": 77,
            "num_hidden_layers": 6,
            "layer_types": _SLIDING,
        },
    ),
    (
        "gemma4_text",
        {
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 5000.0,
                    "partial_rotary_factor": 0.5,
                },
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 6000.0},
            }
        },
    ),
    ("gemma4_text", {"per_layer_config": {}}),
    (
        "gemma4_text",
        {
            "num_hidden_layers": 11,
            "per_layer_config": {"05": {"head_dim": 64}, "10": {"num_key_value_heads": 2}},
        },
    ),
    ("glm4_moe_lite", {"n_group": 8, "topk_group": 2, "num_experts_per_tok": 8}),
    ("glm4_moe_lite", {"num_local_experts": 32, "num_hidden_layers": 3}),
    (
        "glm4_moe_lite",
        {"rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}, "rope_theta": 7000.0},
    ),
    (
        "glm4_moe_lite",
        {"num_hidden_layers": 4, "mlp_layer_types": ["sparse", "dense", "sparse", "dense"]},
    ),
    (
        "ministral3",
        {"rope_parameters": _YARN | {"llama_4_scaling_beta": 0.3, "rope_theta": 7000.0}},
    ),
    ("ministral3", {"rope_theta": 7000.0}),
    ("ministral3", {"rope_scaling": _YARN}),
    ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 2047}),
    *(
        ("phi3", {"rope_scaling": _LONGROPE | {"type": kind}} | longer)
        for kind in ("longrope", "yarn")
        for longer in ({}, {"max_position_embeddings": 131_072})
    ),
    (
        "phi3",
        {"rope_scaling": _LONGROPE | {"type": "longrope"}, "original_max_position_embeddings": 512},
    ),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 64}),
    ("smollm3", {"use_sliding_window": True, "no_rope_layers": [0] * 36}),
    ("smollm3", {"no_rope_layers": [0] + [1] * 35, "no_rope_layer_interval": 2, "head_dim": 64}),
    ("granite", {"embedding_multiplier": 12, "attention_bias": True, "mlp_bias": True}),
    ("olmo3", {"num_hidden_layers": 6, "layer_types": _SLIDING}),
    ("lfm2", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    ("lfm2", {"block_ff_dim": 6912, "tie_embedding": False, "rope_theta": 7e3}),
    ("olmo3", {"rope_scaling": _YARN | {"attention_factor": 1.2}, "rope_theta": 500_000}),
    (
        "olmo3",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 60_000.0},
            }
        },
    ),
    *(
        (family, change)
        for family in (
            *("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma2"),
            *("smollm3", "granite", "gpt_oss", "qwen3_next", "qwen3_5_text"),
        )
        for change in (
            {"rope_theta": 5000.0},
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 6000.0},
                "rope_theta": 5000.0,
            },
            {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5000.0},
            {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 7000.0}},
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": None, "rope_theta": 8000.0},
            {"rope_scaling": dict(_YARN)},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        )
    ),
]


# For any family at once, whether its class knows the field or not.
MIXED: dict[str, list[Any]] = {
    **{name: values for name, values in READ.items() if values},
    "mlp_layer_types": [None, ["sparse", "dense"] * 3],
    "no_rope_layers": [None, [0, 1] * 3],
    "num_hidden_layers": [6, 30],
    "num_attention_heads": [4, 16, 32],
    "hidden_act": ["swish", "gelu", "gelu_pytorch_tanh"],
    "layer_types": [None, _SLIDING, ["full_attention"] * 6],
    "sliding_window_pattern": [2, 6],
    "partial_rotary_factor": [1.0, 0.5],
    "original_max_position_embeddings": [256],
    "rope_theta": [5000.0, 1e6],
    "rope_local_base_freq": [7.0],
    "rope_scaling": [
        None,
        {},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 9000.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "default", "type": "linear", "factor": 3.0},
    ],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 11_000.0},
        {"rope_type": "linear", "factor": 5.0},
        {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50_000.0},
            "sliding_attention": {"rope_type": "default"},
        },
    ],
}


def fields_of(model_type: str) -> list[str]:
    return list(inspect.get_annotations(getattr(transformers, CLASSES[model_type])))


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_field_of_their_class_is_decided(model_type):
    assert set(fields_of(model_type)) <= READ.keys() | NO_EFFECT.keys() | REFUSED.keys()


def test_every_family_is_compared():
    wrappers = {"mistral3", "gemma3", "gemma4", "qwen3_5", "qwen3_5_moe"}
    assert set(FAMILIES) == {*CLASSES, *wrappers, "openelm"}


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_file_does_not_say(model_type):
    assert ours(model_type, {}) == theirs(model_type, {})


@pytest.mark.parametrize("model_type", CLASSES)
def test_single_fields(model_type):
    own = [name for name in fields_of(model_type) if (model_type, name) not in REFUSED_IN]
    plain, tried = ours(model_type, {}), 0
    for name in own:
        for value in READ.get(name, []):
            if value is None and (model_type, name) in NO_NULL:
                continue
            raw, tried = {name: value}, tried + 1
            mine = ours(model_type, raw)
            assert mine == theirs(model_type, raw), raw
            if (model_type, name) in ALONE_WITHOUT_EFFECT:
                assert mine == plain
    assert tried > 10


@pytest.mark.parametrize(("model_type", "raw"), TOGETHER)
def test_fields_together(model_type, raw):
    assert ours(model_type, raw) == theirs(model_type, raw)


@fuzz(
    examples=300,
    model_type=st.sampled_from(sorted(CLASSES)),
    raw=st.lists(st.sampled_from(sorted(MIXED)), max_size=6, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({n: st.sampled_from(MIXED[n]) for n in names})
    ),
)
def test_any_fields_are_read_alike_or_refused(model_type, raw):
    try:
        mine = ours(model_type, raw)
    except EdgeKVError:
        return
    if any(value is None and (model_type, name) in NO_NULL for name, value in raw.items()):
        return
    if model_type == "gemma4_text" and raw.get("rope_scaling", 0) is None:
        # A null there makes transformers look at this one too, which it does not else.
        raw = {name: value for name, value in raw.items() if name != "rope_theta"}
    with contextlib.suppress(*hf_configs.REFUSALS):
        assert mine == theirs(model_type, raw)


@pytest.mark.parametrize("model_type", CLASSES)
def test_fields_without_effect(model_type):
    for name in fields_of(model_type):
        if name in NO_EFFECT:
            assert parsed(model_type, {name: NO_EFFECT[name]}) == parsed(model_type, {})


@pytest.mark.parametrize("model_type", CLASSES)
def test_refused_fields(model_type):
    own = {name: REFUSED[name] for name in fields_of(model_type) if name in REFUSED}
    own |= {name: value for (family, name), value in REFUSED_IN.items() if family == model_type}
    for name, value in own.items():
        with pytest.raises(UnsupportedModel, match=f"{name} {value!r}"):
            parsed(model_type, {name: value})


def test_the_text_part_of_a_multimodal_gemma3_has_the_same_defaults():
    text = {"hidden_size": 2560, "num_hidden_layers": 34}
    config = transformers.Gemma3Config(text_config=dict(text)).text_config
    wrapped = parse_config(Fields({"model_type": "gemma3", "text_config": text}, "config.json"))
    assert wrapped == parsed("gemma3_text", text)
    assert wrapped.vocab_size == config.vocab_size
    assert [x.sliding_window for x in wrapped.layers].count(None) == config.layer_types.count(
        "full_attention"
    )


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_transformers_saves_is_read_as_what_it_was_given(model_type):
    """It writes newer fields: `rope_parameters`, `per_layer_config`, `num_local_experts`."""
    for raw in [{}, *(raw for family, raw in TOGETHER if family == model_type)]:
        config = getattr(transformers, CLASSES[model_type])(**copied(raw))
        if "layer_types" not in raw or model_type != "mistral":
            assert ours(model_type, saved(config)) == ours(model_type, raw), raw


@pytest.mark.parametrize("name", PUBLISHED_FAMILIES)
def test_published_configurations(name):
    raw = {key: value for key, value in text_part(name).items() if key != "model_type"}
    model_type = text_part(name)["model_type"]
    assert ours(model_type, raw) == theirs(model_type, raw)


def saved(config: Any) -> dict[str, Any]:
    """As in a `config.json`."""
    raw = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in raw.items() if name != "model_type"}


def test_any_other_model_type_is_refused_by_name():
    others = sorted(set(transformers.models.auto.configuration_auto.CONFIG_MAPPING) - set(FAMILIES))
    assert len(others) > 300
    for model_type in others:
        with pytest.raises(UnsupportedModel, match=f"model_type {model_type!r} is not supported"):
            parsed(model_type, {})
