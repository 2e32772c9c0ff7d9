"""Each family reads a configuration as transformers' own class does, field by field.

A field of such a class that is in none of the three tables below fails: somebody has to decide
whether it is read, refused or without effect.
"""

import inspect
from typing import Any

import pytest
from fuzz import fuzz
from hypothesis import strategies as st

from edgekv.errors import EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families import parse_config

transformers = pytest.importorskip("transformers", minversion="5")

pytestmark = pytest.mark.slow

CLASSES = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma3_text": "Gemma3TextConfig",
}
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
    "layer_types": [],  # below
    "rope_parameters": [],  # below
}
NO_EFFECT: dict[str, Any] = {
    "initializer_range": 0.5,
    "use_cache": False,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": [1, 2],
    "pretraining_tp": 2,
    "attention_dropout": 0.1,
}
REFUSED: dict[str, Any] = {
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": True,
}
# Where null is no value: transformers refuses it, or the model could not run. We take it for the
# sizes, as GGUF files leave them out.
NO_NULL = {
    ("mistral", "num_key_value_heads"),
    ("qwen3", "head_dim"),
    ("gemma3_text", "head_dim"),
    ("gemma3_text", "num_key_value_heads"),
    ("gemma3_text", "sliding_window"),
}
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
    ("gemma3_text", {"rope_theta": 5.0, "rope_local_base_freq": 6.0}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 7.0}),
    ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}),
    (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
            }
        },
    ),
    *(
        (family, change)
        for family in ("llama", "mistral", "qwen2", "qwen3")
        for change in (
            {"rope_theta": 5.0},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 6.0}, "rope_theta": 5.0},
            {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 5.0},
            {"rope_scaling": {"type": "linear", "factor": 3.0, "rope_theta": 7.0}},
            {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            {"rope_scaling": None, "rope_theta": 8.0},
            {"rope_scaling": dict(_YARN)},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        )
    ),
]


# For any family at once, whether its class knows the field or not.
MIXED: dict[str, list[Any]] = {
    **{name: values for name, values in READ.items() if values},
    "num_hidden_layers": [6, 30],
    "num_attention_heads": [4, 16, 32],
    "hidden_act": ["swish", "gelu", "gelu_pytorch_tanh"],
    "layer_types": [None, _SLIDING, ["full_attention"] * 6],
    "sliding_window_pattern": [2, 6],
    "partial_rotary_factor": [1.0, 0.5],
    "original_max_position_embeddings": [256],
    "rope_theta": [5.0, 1e6],
    "rope_local_base_freq": [7.0],
    "rope_scaling": [
        None,
        {},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "default", "type": "linear", "factor": 3.0},
    ],
    "rope_parameters": [
        None,
        {"rope_type": "default", "rope_theta": 11.0},
        {"rope_type": "linear", "factor": 5.0},
        {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0},
            "sliding_attention": {"rope_type": "default"},
        },
    ],
}


def theirs(model_type: str, raw: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a configuration, in our words."""
    name = CLASSES[model_type]
    if model_type == "mistral" and "layer_types" in raw:  # so does AutoConfig
        name = "MinistralConfig"
    config = getattr(transformers, name)(**{key: _copied(value) for key, value in raw.items()})
    kinds = getattr(config, "layer_types", None) if model_type != "llama" else None
    if kinds is None:
        window = config.sliding_window if model_type == "mistral" else None
        kinds = ["full_attention" if window is None else "sliding_attention"]
        kinds *= config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    gemma = model_type == "gemma3_text"
    act = config.hidden_activation if gemma else config.hidden_act
    biased = model_type in ("llama", "qwen3", "gemma3_text") and config.attention_bias
    mlp_biased = model_type == "llama" and config.mlp_bias
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_size": config.intermediate_size,
        "heads": (config.num_attention_heads, config.num_key_value_heads, head_dim),
        "gelu": "gelu" in act,
        "norm_eps": config.rms_norm_eps,
        "scale": (config.query_pre_attn_scalar if gemma else head_dim) ** -0.5,
        "biases": (model_type == "qwen2" or biased, biased, mlp_biased),
        "windows": [window if kind == "sliding_attention" else None for kind in kinds],
        "ropes": [_their_rope(config.rope_parameters, kind) for kind in kinds],
        "context": _their_context(config, config.rope_parameters),
    }


def _copied(value: Any) -> Any:
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


def _their_rope(parameters: dict[str, Any], kind: str) -> tuple[float, float | None]:
    own = parameters.get(kind, parameters)
    return own["rope_theta"], own["factor"] if own["rope_type"] in ("linear", "yarn") else None


def _their_context(config: Any, parameters: dict[str, Any]) -> int:
    if parameters.get("rope_type") != "yarn":
        return config.max_position_embeddings
    stretched = int(parameters["factor"] * parameters["original_max_position_embeddings"])
    return max(config.max_position_embeddings, stretched)


def ours(model_type: str, raw: dict[str, Any]) -> dict[str, Any]:
    config = parsed(model_type, raw)
    (shape,) = {(x.ffn_size, x.num_heads, x.num_kv_heads, x.head_dim) for x in config.layers}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_size": shape[0],
        "heads": shape[1:],
        "gelu": config.activation == "gelu_tanh",
        "norm_eps": config.norm_eps,
        "scale": config.attention_scale,
        "biases": (config.qkv_bias, config.out_bias, config.mlp_bias),
        "windows": [layer.sliding_window for layer in config.layers],
        "ropes": [
            (layer.rope.base, max(layer.rope.wavelength_factors or (None,)))
            for layer in config.layers
        ],
        "context": config.context_max,
    }


def parsed(model_type: str, raw: dict[str, Any]) -> DecoderConfig:
    return parse_config(Fields({"model_type": model_type, **raw}, "config.json"))


def fields_of(model_type: str) -> list[str]:
    return list(inspect.get_annotations(getattr(transformers, CLASSES[model_type])))


@pytest.mark.parametrize("model_type", CLASSES)
def test_every_field_of_their_class_is_decided(model_type):
    assert set(fields_of(model_type)) <= READ.keys() | NO_EFFECT.keys() | REFUSED.keys()


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_file_does_not_say(model_type):
    assert ours(model_type, {}) == theirs(model_type, {})


@pytest.mark.parametrize("model_type", CLASSES)
def test_single_fields(model_type):
    own = [name for name in fields_of(model_type) if name in READ]
    assert len(own) > 10
    for name in own:
        for value in READ[name]:
            if value is None and (model_type, name) in NO_NULL:
                continue
            raw = {name: value}
            assert ours(model_type, raw) == theirs(model_type, raw), raw


@pytest.mark.parametrize(("model_type", "raw"), TOGETHER)
def test_fields_together(model_type, raw):
    assert ours(model_type, raw) == theirs(model_type, raw)


@fuzz(
    examples=100,
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
    assert mine == theirs(model_type, raw)


@pytest.mark.parametrize("model_type", CLASSES)
def test_fields_without_effect(model_type):
    for name in fields_of(model_type):
        if name in NO_EFFECT:
            assert parsed(model_type, {name: NO_EFFECT[name]}) == parsed(model_type, {})


@pytest.mark.parametrize("model_type", CLASSES)
def test_refused_fields(model_type):
    for name in fields_of(model_type):
        if name in REFUSED:
            with pytest.raises(UnsupportedModel, match=f"{name} {REFUSED[name]}"):
                parsed(model_type, {name: REFUSED[name]})


def test_the_text_part_of_a_multimodal_gemma3_has_the_same_defaults():
    text = {"hidden_size": 2560, "num_hidden_layers": 34}
    config = transformers.Gemma3Config(text_config=dict(text)).text_config
    wrapped = parse_config(Fields({"model_type": "gemma3", "text_config": text}, "config.json"))
    assert wrapped == parsed("gemma3_text", text)
    assert wrapped.vocab_size == config.vocab_size
    assert [x.sliding_window for x in wrapped.layers].count(None) == config.layer_types.count(
        "full_attention"
    )


def test_any_other_model_type_is_refused_by_name():
    ours_too = {*CLASSES, "gemma3"}
    others = sorted(set(transformers.models.auto.configuration_auto.CONFIG_MAPPING) - ours_too)
    assert len(others) > 300
    for model_type in others:
        with pytest.raises(UnsupportedModel, match=f"model_type {model_type!r} is not supported"):
            parsed(model_type, {})
