"""`config.json` and GGUF metadata → DecoderConfig, and what is refused with which words."""

import math

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import strategies as st

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families import FAMILIES, parse_config
from edgekv.models.gguf_config import (
    ROPE_LONG,
    ROPE_SHORT,
    SUPPORTED,
    field_names,
    row_order,
    tensor_names,
    to_hf_fields,
)
from edgekv.models.rope_scaling import KINDS

# The fields of published models that decide something; what they leave out is left out here.
LLAMA_3_2_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
}
QWEN2_0_5B = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
}
QWEN3_0_6B = {
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
}
GEMMA3_4B = {
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
    "vision_config": {"hidden_size": 1152},
}
GEMMA3_1B = {
    "model_type": "gemma3_text",
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
}
OPENELM_270M = {
    "model_type": "openelm",
    "ffn_dim_divisor": 256,
    "ffn_multipliers": [
        0.5,
        0.73,
        0.97,
        1.2,
        1.43,
        1.67,
        1.9,
        2.13,
        2.37,
        2.6,
        2.83,
        3.07,
        3.3,
        3.53,
        3.77,
        4.0,
    ],
    "ffn_with_glu": True,
    "head_dim": 64,
    "max_context_length": 2048,
    "model_dim": 1280,
    "normalize_qk_projections": True,
    "num_kv_heads": [3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5],
    "num_query_heads": [12, 12, 12, 12, 12, 16, 16, 16, 16, 16, 16, 16, 20, 20, 20, 20],
    "num_transformer_layers": 16,
    "rope_freq_constant": 10000,
    "share_input_output_layers": True,
    "vocab_size": 32000,
}
ROPE_FIELDS = (
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
PUBLISHED = [
    LLAMA_3_2_1B,
    MISTRAL_7B,
    QWEN2_0_5B,
    QWEN3_0_6B,
    GEMMA3_1B,
    GEMMA3_4B,
    OPENELM_270M,
]


ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.sampled_from([0, -1, 0.0, 1e-9, 1 << 70, 10**400, 2.0, *KINDS, "full_attention"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(ROPE_FIELDS), inner, max_size=6)
    ),
    max_leaves=8,
)


def parse(config: dict[str, object], source: str = "config.json") -> DecoderConfig:
    return parse_config(Fields(config, source))


class TestPublishedModels:
    def test_llama(self):
        config = parse(LLAMA_3_2_1B)
        layer = config.layers[0]
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (16, 2048, 128256)
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (32, 8, 64)
        assert layer.rope.base == 5e5
        assert layer.rope.magnitude == 1.0
        factors = layer.rope.wavelength_factors
        assert factors is not None
        # Short wavelengths are kept, long ones stretched by 32; between them it grows.
        assert (factors[0], factors[-1]) == (1.0, 32.0)
        assert list(factors) == sorted(factors)
        assert config.context_max == 131072
        assert config.tied_head is True
        flags = (config.qkv_bias, config.out_bias, config.mlp_bias, config.qk_norm)
        assert not any(flags)
        assert config.attention_scale == 0.125

    def test_mistral_has_a_window_in_every_layer(self):
        assert {layer.sliding_window for layer in parse(MISTRAL_7B).layers} == {4096}
        without = parse(MISTRAL_7B | {"sliding_window": None})
        assert {layer.sliding_window for layer in without.layers} == {None}

    def test_qwen2_has_biases_and_no_window_unless_asked(self):
        config = parse(QWEN2_0_5B)
        assert config.qkv_bias
        assert not config.out_bias
        assert config.layers[0].head_dim == 64
        assert {layer.sliding_window for layer in config.layers} == {None}
        windowed = parse(QWEN2_0_5B | {"use_sliding_window": True})
        assert [layer.sliding_window for layer in windowed.layers] == [None] * 21 + [32768] * 3

    def test_qwen3_heads_are_wider_than_the_hidden_size(self):
        config = parse(QWEN3_0_6B)
        assert config.qk_norm
        assert config.layers[0].num_heads * config.layers[0].head_dim == 2048
        assert config.attention_scale == pytest.approx(128**-0.5)

    def test_gemma3_multimodal_is_read_from_its_text_part(self):
        config = parse(GEMMA3_4B)
        layer = config.layers[0]
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (34, 2560, 262208)
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (8, 4, 256)
        assert [i for i, x in enumerate(config.layers) if x.sliding_window is None] == [
            5, 11, 17, 23, 29,
        ]  # fmt: skip
        assert config.layers[0].rope == RopeConfig(base=10_000.0)
        assert config.layers[5].rope == RopeConfig(
            base=1_000_000.0, wavelength_factors=(8.0,) * 128
        )
        assert config.embedding_scale == 50.5  # sqrt(2560) = 50.596 in bfloat16
        assert config.norm_offset == 1.0

    def test_openelm_layers_differ(self):
        config = parse(OPENELM_270M)
        assert [layer.num_heads for layer in config.layers] == OPENELM_270M["num_query_heads"]
        assert config.layers[0].ffn_size == 768
        assert config.layers[-1].ffn_size == 5120
        assert all(layer.ffn_size % 256 == 0 for layer in config.layers)


class TestRope:
    def test_newer_files_call_it_rope_parameters(self):
        old = parse(LLAMA_3_2_1B)
        scaling = dict(LLAMA_3_2_1B["rope_scaling"]) | {"rope_theta": 500000.0}
        new = LLAMA_3_2_1B | {"rope_parameters": scaling, "rope_theta": None, "rope_scaling": None}
        assert parse(new) == old

    def test_gemma3_may_tell_its_layers_apart(self):
        text = dict(GEMMA3_4B["text_config"]) | {
            "rope_scaling": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
        assert parse(GEMMA3_4B | {"text_config": text}) == parse(GEMMA3_4B)

    def test_default_scaling_is_none(self):
        for scaling in ({}, {"type": "default"}, {"rope_type": "default"}):
            config = parse(LLAMA_3_2_1B | {"rope_scaling": scaling})
            assert config.layers[0].rope == RopeConfig(base=5e5)

    @pytest.mark.parametrize("kind", ["su", "mrope", "proportional", ""])
    def test_other_scalings_are_refused(self, kind):
        with pytest.raises(
            UnsupportedModel, match=rf"config.json: rope_scaling: rope_type '{kind}'"
        ) as e:
            parse(LLAMA_3_2_1B | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
        assert e.value.hint == "supported: default, linear, dynamic, llama3, yarn, longrope"

    def test_an_empty_scaling_does_not_hide_the_newer_field(self):
        new = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
        config = parse(QWEN3_0_6B | {"rope_scaling": {}, "rope_parameters": new})
        assert config.layers[0].rope == RopeConfig(base=7.0, wavelength_factors=(2.0,) * 64)

    def test_dynamic_scaling_is_plain_up_to_the_context_and_there_it_ends(self):
        dynamic = {"type": "dynamic", "factor": 4.0}
        assert parse(MISTRAL_7B | {"rope_scaling": dynamic}) == parse(MISTRAL_7B)
        longer = parse_config(Fields(MISTRAL_7B | {"rope_scaling": dynamic}, "x"), 1 << 20)
        assert longer.context_max == MISTRAL_7B["max_position_embeddings"]

    @pytest.mark.parametrize(
        ("scaling", "outer", "context"),
        [
            ({"original_max_position_embeddings": 32768}, {}, 131_072),
            ({"original_max_position_embeddings": 8192}, {}, 40_960),
            ({}, {}, 40_960),  # transformers takes it to be the original one
            ({}, {"original_max_position_embeddings": 32768}, 131_072),
        ],
    )
    def test_yarn_goes_as_far_as_it_stretches(self, scaling, outer, context):
        yarn = {"rope_type": "yarn", "factor": 4.0} | scaling
        assert parse(QWEN3_0_6B | {"rope_scaling": yarn} | outer).context_max == context

    @pytest.mark.parametrize(("asked", "short"), [(None, False), (4097, False), (4096, True)])
    def test_longrope_goes_by_the_context_it_is_opened_for(self, asked, short):
        half = QWEN3_0_6B["head_dim"] // 2
        scaling = {
            "rope_type": "longrope",
            "original_max_position_embeddings": 4096,
            "short_factor": [1.0] * half,
            "long_factor": [2.0] * half,
        }
        config = parse_config(Fields(QWEN3_0_6B | {"rope_scaling": scaling}, "x"), asked)
        rope = config.layers[0].rope
        assert config.context_max == (asked or 40_960)
        assert rope.for_short == short
        assert rope.wavelength_factors == ((1.0 if short else 2.0),) * half
        # Of the model, whatever it is opened for.
        assert rope.magnitude == pytest.approx(math.sqrt(1 + math.log(10) / math.log(4096)))


class TestWindows:
    """As transformers' classes read them; `test_transformers_config` compares more."""

    def test_a_llama_has_none(self):
        config = parse(LLAMA_3_2_1B | {"sliding_window": 4096, "use_sliding_window": True})
        assert {layer.sliding_window for layer in config.layers} == {None}
        gguf = parse_gguf(GGUF_LLAMA | {"llama.attention.sliding_window": 16})
        assert {layer.sliding_window for layer in gguf.layers} == {None}

    def test_a_mistral_that_says_nothing_has_the_default(self):
        absent = {name: value for name, value in MISTRAL_7B.items() if name != "sliding_window"}
        assert {layer.sliding_window for layer in parse(absent).layers} == {4096}

    @pytest.mark.parametrize("config", [QWEN2_0_5B, QWEN3_0_6B])
    def test_qwens_have_them_where_the_switch_says_so(self, config):
        asked = {"sliding_window": 64, "max_window_layers": 20}
        off = parse(config | asked)
        on = parse(config | asked | {"use_sliding_window": True})
        assert {layer.sliding_window for layer in off.layers} == {None}
        above = on.num_layers - 20
        assert [layer.sliding_window for layer in on.layers] == [None] * 20 + [64] * above

    def test_gemma3_in_gguf(self):
        window = {"gemma3.attention.sliding_window": 16, "gemma3.attention.key_length": 16}
        six = {"gemma3.block_count": 6} | window
        config = parse_gguf(renamed("gemma3", **six))
        assert [layer.sliding_window for layer in config.layers] == [16] * 5 + [None]
        three = parse_gguf(
            renamed("gemma3", **six, **{"gemma3.attention.sliding_window_pattern": 3})
        )
        assert [layer.sliding_window for layer in three.layers] == [16, 16, None] * 2
        flags = {"gemma3.attention.sliding_window_pattern": [True, False] * 3}
        listed = parse_gguf(renamed("gemma3", **six, **flags))
        assert [layer.sliding_window for layer in listed.layers] == [16, None] * 3
        none = parse_gguf(renamed("gemma3", **{"gemma3.attention.key_length": 16}))
        assert {layer.sliding_window for layer in none.layers} == {None}
        assert {layer.rope.base for layer in none.layers} == {10_000.0}


class TestRefused:
    def test_an_unknown_model_type(self):
        with pytest.raises(UnsupportedModel, match=r"config.json: model_type 'mamba'") as e:
            parse({"model_type": "mamba"})
        for known in FAMILIES:
            assert known in e.value.hint

    @pytest.mark.parametrize(
        ("config", "change", "message"),
        [
            (LLAMA_3_2_1B, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0\.5"),
            (
                QWEN3_0_6B,
                {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
                r"rope_parameters: partial_rotary_factor 0\.25",
            ),
            (LLAMA_3_2_1B, {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            (GEMMA3_1B, {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
            (QWEN2_0_5B, {"is_causal": False}, "is_causal False"),
            (LLAMA_3_2_1B, {"rope_traditional": True}, "rope_traditional True"),
            (LLAMA_3_2_1B, {"per_layer_config": {"3": {"head_dim": 8}}}, "per_layer_config {'3'"),
            (GEMMA3_1B, {"use_bidirectional_attention": True}, "bidirectional_attention True"),
            (GEMMA3_1B, {"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0"),
            (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping 50\.0"),
            (
                GEMMA3_1B,
                {"rope_parameters": {"rope_type": "linear", "factor": 8.0}},
                "rope_parameters {'rope_type': 'linear'",
            ),
            (
                GEMMA3_1B,
                {"rope_scaling": {"type": "linear", "factor": 8.0}},
                "rope_scaling: type 'linear'",
            ),
            (
                QWEN3_0_6B,
                {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
                "rope_parameters {'full_attention'",
            ),
            (LLAMA_3_2_1B, {"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
            (
                LLAMA_3_2_1B,
                {"layer_types": ["sliding_attention"] * 16},
                "layer_types .* of a llama",
            ),
            (MISTRAL_7B, {"layer_types": ["chunked_attention"] * 32}, "layer_types"),
            (QWEN2_0_5B, {"layer_types": ["sliding_attention"] * 24}, "without a window"),
            (OPENELM_270M, {"ffn_with_glu": False}, "ffn_with_glu False"),
            (OPENELM_270M, {"activation_fn_name": "gelu"}, "activation_fn_name 'gelu'"),
            (OPENELM_270M, {"normalization_layer_name": "layer_norm"}, "'layer_norm'"),
            (OPENELM_270M, {"rope_scaling": {"type": "linear"}}, "rope_scaling {'type'"),
        ],
    )
    def test_what_edgekv_does_not_run(self, config, change, message):
        with pytest.raises(UnsupportedModel, match=message) as e:
            parse(config | change)
        assert "config.json" in str(e.value)
        assert e.value.hint

    @pytest.mark.parametrize(
        "harmless",
        [
            {"partial_rotary_factor": 1.0, "is_causal": True, "rope_traditional": False},
            {"per_layer_config": {}, "attention_dropout": 0.1, "pretraining_tp": 2},
            {"attention_multiplier": 0.5, "some_later_field": [1, 2], "use_mrope": False},
        ],
    )
    def test_what_changes_nothing_is_not_refused(self, harmless):
        assert parse(QWEN3_0_6B | harmless) == parse(QWEN3_0_6B)

    def test_soft_capping_in_the_text_part(self):
        text = dict(GEMMA3_4B["text_config"]) | {"final_logit_softcapping": 30.0}
        with pytest.raises(UnsupportedModel, match=r"text_config: final_logit_softcapping 30\.0"):
            parse(GEMMA3_4B | {"text_config": text})

    @pytest.mark.parametrize(
        ("config", "change", "message"),
        [
            (LLAMA_3_2_1B, {"hidden_size": None}, "'hidden_size' is missing"),
            (LLAMA_3_2_1B, {"hidden_size": "2048"}, "'hidden_size' is '2048'"),
            (LLAMA_3_2_1B, {"hidden_size": True}, "'hidden_size' is True"),
            (LLAMA_3_2_1B, {"num_hidden_layers": 10**6}, "'num_hidden_layers' is 1000000"),
            (LLAMA_3_2_1B, {"num_attention_heads": 0}, "'num_attention_heads' is 0"),
            (LLAMA_3_2_1B, {"num_key_value_heads": 5}, "5 key-value heads"),
            (LLAMA_3_2_1B, {"head_dim": 63}, "size 63"),
            (
                LLAMA_3_2_1B,
                {
                    "rope_scaling": {
                        "rope_type": "llama3",
                        "factor": 8.0,
                        "low_freq_factor": 4.0,
                        "high_freq_factor": 1.0,
                    }
                },
                "high_freq_factor is 1",
            ),
            (LLAMA_3_2_1B, {"rope_scaling": {"type": "yarn"}}, "'factor' is missing"),
            (
                LLAMA_3_2_1B,
                {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1.0}},
                "rope_theta is 1",
            ),
            (
                LLAMA_3_2_1B,
                {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
                "'short_factor' is",
            ),
            (LLAMA_3_2_1B, {"rope_theta": -1.0}, "'rope_theta' is -1.0"),
            (LLAMA_3_2_1B, {"rope_theta": math.nan}, "'rope_theta' is nan"),
            (LLAMA_3_2_1B, {"rope_theta": 10**400}, "'rope_theta' is 1000"),
            (LLAMA_3_2_1B, {"rope_scaling": "linear"}, "'rope_scaling' is 'linear'"),
            (LLAMA_3_2_1B, {"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
            (LLAMA_3_2_1B, {"rope_scaling": {"type": "linear", "factor": 0}}, "'factor' is 0"),
            (LLAMA_3_2_1B, {"tie_word_embeddings": 1}, "'tie_word_embeddings' is 1"),
            (OPENELM_270M, {"num_query_heads": [12]}, "'num_query_heads' is"),
            (OPENELM_270M, {"num_kv_heads": [3.5] * 16}, "'num_kv_heads' is"),
            (OPENELM_270M, {"ffn_multipliers": [-1.0] * 16}, "'ffn_multipliers' is"),
        ],
    )
    def test_garbled_fields_are_named(self, config, change, message):
        with pytest.raises(CheckpointCorrupt, match=message) as e:
            parse(config | change)
        assert e.value.hint

    @pytest.mark.slow
    @fuzz(
        examples=150,
        config=st.sampled_from(PUBLISHED),
        data=st.data(),
        value=ANY_VALUE,
    )
    def test_any_value_in_any_field_is_parsed_or_refused(self, config, data, value):
        more = {"layer_types", "text_config", "rope_scaling", "rope_parameters", "sliding_window"}
        name = data.draw(st.sampled_from(sorted(config.keys() | more)))
        try:
            parsed = parse(config | {name: value})
        except EdgeKVError:
            return
        assert parsed.num_layers >= 1
        assert math.isfinite(parsed.attention_scale)
        for layer in parsed.layers:
            assert math.isfinite(layer.rope.magnitude)
            assert all(0 < f < math.inf for f in layer.rope.wavelength_factors or ())


GGUF_LLAMA = {
    "general.architecture": "llama",
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.context_length": 512,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": 16,
    "llama.vocab_size": 300,
}


GGUF_KEYS = (
    "attention.causal",
    "attention.key_length",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.value_length",
    "expert_count",
    "rope.dimension_sections",
    "rope.freq_base_swa",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
)


def parse_gguf(metadata: dict[str, object]) -> DecoderConfig:
    names = field_names(str(metadata["general.architecture"]))
    return parse_config(Fields(to_hf_fields(metadata, "model.gguf"), "model.gguf", names))


def renamed(arch: str, **changes: object) -> dict[str, object]:
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in GGUF_LLAMA.items()}
    return metadata | {"general.architecture": arch} | changes


class TestGguf:
    def test_llama(self):
        config = parse_gguf(GGUF_LLAMA)
        assert (config.family, config.num_layers, config.vocab_size) == ("llama", 2, 300)
        assert config.layers[0].head_dim == 16
        assert config.context_max == 512

    @pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
    def test_other_architectures_have_the_same_fields(self, arch):
        metadata = renamed(arch, **{f"{arch}.attention.key_length": 16})
        config = parse_gguf(metadata)
        assert config.family == arch
        assert config.hidden_size == 64

    def test_the_vocabulary_may_be_counted_from_the_tokens(self):
        tokens = [str(i) for i in range(77)]
        metadata = GGUF_LLAMA | {"llama.vocab_size": None, "tokenizer.ggml.tokens": tokens}
        assert parse_gguf(metadata).vocab_size == 77

    def test_gemma3_norms_are_as_stored(self):
        config = parse_gguf(renamed("gemma3", **{"gemma3.attention.key_length": 16}))
        assert config.norm_offset == 0.0
        assert config.attention_scale == 0.25

    def test_gemma3_27b_scales_by_the_width_of_a_head(self):
        metadata = renamed(
            "gemma3",
            **{
                "gemma3.block_count": 62,
                "gemma3.attention.key_length": 32,
                "gemma3.rope.dimension_count": 32,
            },
        )
        assert parse_gguf(metadata).attention_scale == pytest.approx((64 / 4) ** -0.5)

    def test_openelm_widths_come_back_exactly(self):
        metadata = {
            "general.architecture": "openelm",
            "openelm.embedding_length": 1280,
            "openelm.block_count": 3,
            "openelm.feed_forward_length": [768, 1024, 4999],
            "openelm.attention.head_count": [12, 12, 16],
            "openelm.attention.head_count_kv": [3, 3, 4],
            "openelm.attention.key_length": 64,
            "openelm.attention.layer_norm_rms_epsilon": 1e-6,
            "openelm.context_length": 2048,
            "openelm.rope.freq_base": 10000.0,
            "openelm.vocab_size": 32000,
        }
        assert [layer.ffn_size for layer in parse_gguf(metadata).layers] == [768, 1024, 4999]
        with pytest.raises(CheckpointCorrupt, match="feed_forward_length"):
            parse_gguf(metadata | {"openelm.feed_forward_length": 768})

    def test_an_unsupported_architecture(self):
        with pytest.raises(UnsupportedModel, match=r"model.gguf: GGUF architecture 'phi3'") as e:
            to_hf_fields({"general.architecture": "phi3"}, "model.gguf")
        for known in SUPPORTED:
            assert known in e.value.hint

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("expert_count", 8),
            ("attention.causal", False),
            ("attention.scale", 0.1),
            ("final_logit_softcapping", 30.0),
            ("rope.dimension_count", 8),
            ("rope.dimension_sections", [8, 8, 8, 0]),
            ("attention.value_length", 8),
            ("rope.scaling.yarn_ext_factor", 0.5),
            ("rope.scaling.yarn_log_multiplier", 0.1),
            ("rope.scaling.attn_factor", 1.2),
        ],
    )
    def test_what_edgekv_does_not_run_is_named_with_its_value(self, key, value):
        with pytest.raises(UnsupportedModel) as e:
            parse_gguf(GGUF_LLAMA | {"llama.attention.key_length": 16, f"llama.{key}": value})
        assert f"model.gguf: llama.{key} {value!r}" in str(e.value)

    @pytest.mark.parametrize(
        ("metadata", "factor"),
        [
            ({"scaling.type": "linear", "scaling.factor": 4.0}, 4.0),
            ({"scaling.factor": 4.0}, 4.0),
            ({"scale_linear": 4.0}, 4.0),
            ({"scaling.factor": 2.0, "scale_linear": 4.0}, 2.0),
            ({"scaling.type": "linear", "scaling.factor": 0.0}, None),
            ({"scaling.type": "linear"}, None),
            ({"scaling.type": "none", "scaling.factor": 4.0}, None),
            ({"scaling.attn_factor": 1.0}, None),
        ],
    )
    def test_linear_scaling(self, metadata, factor):
        """A factor without a type is linear, one of 0 is none (llama.cpp's `load_hparams`)."""
        metadata = {f"llama.rope.{key}": value for key, value in metadata.items()}
        rope = parse_gguf(GGUF_LLAMA | metadata).layers[0].rope
        assert rope == RopeConfig(
            base=1e4, wavelength_factors=None if factor is None else (factor,) * 8
        )

    @pytest.mark.parametrize(
        ("more", "magnitude"),
        [
            ({}, 0.1 * math.log(4) + 1),
            ({"attn_factor": 2.0}, 2 * (0.1 * math.log(4) + 1)),
            ({"yarn_attn_factor": 1.5}, 1.5),
            ({"yarn_attn_factor": 1.5, "attn_factor": 2.0}, 3.0),
        ],
    )
    def test_yarn(self, more, magnitude):
        yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128} | more
        metadata = {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
        config = parse_gguf(GGUF_LLAMA | metadata)
        rope = config.layers[0].rope
        assert rope.magnitude == pytest.approx(magnitude)
        assert rope.wavelength_factors is not None
        assert (rope.wavelength_factors[0], rope.wavelength_factors[-1]) == (1.0, 4.0)
        assert config.context_max == 512

    def test_longrope_is_in_two_tensors(self):
        factors = {ROPE_LONG: [2.0] * 8, ROPE_SHORT: [1.5] * 8}
        metadata = GGUF_LLAMA | {
            "llama.rope.scaling.original_context_length": 128,
            "llama.rope.scaling.attn_factor": 1.25,
        }
        fields = to_hf_fields(metadata, "model.gguf", factors)
        rope = parse(fields).layers[0].rope
        assert (rope.wavelength_factors, rope.magnitude) == ((2.0,) * 8, 1.25)

    @pytest.mark.parametrize("field", ["embedding_length", "block_count", "attention.head_count"])
    def test_a_missing_field_has_the_name_that_it_has_in_the_file(self, field):
        with pytest.raises(CheckpointCorrupt, match=rf"model.gguf: field 'llama\.{field}' is miss"):
            parse_gguf(GGUF_LLAMA | {f"llama.{field}": None})
        with pytest.raises(CheckpointCorrupt, match=rf"model.gguf: field 'llama\.{field}' is 'x'"):
            parse_gguf(GGUF_LLAMA | {f"llama.{field}": "x"})

    @pytest.mark.slow
    @fuzz(examples=150, arch=st.sampled_from(["llama", "qwen2", "qwen3", "gemma3"]), data=st.data())
    def test_any_value_in_any_key_is_parsed_or_refused(self, arch, data):
        metadata = renamed(arch)
        known = [key for key in metadata if "." in key]
        more = [f"{arch}.{key}" for key in GGUF_KEYS]
        for key in data.draw(st.lists(st.sampled_from(known + more), min_size=1, max_size=3)):
            metadata[key] = data.draw(ANY_VALUE)
        try:
            parsed = parse_gguf(metadata)
        except EdgeKVError:
            return
        assert parsed.num_layers >= 1
        assert all(math.isfinite(layer.rope.magnitude) for layer in parsed.layers)

    @pytest.mark.parametrize(
        ("key", "value"), [("block_count", 10**400), ("attention.key_length", math.nan)]
    )
    def test_sizes_that_are_none(self, key, value):
        with pytest.raises(CheckpointCorrupt, match=rf"'gemma3\.{key}' is"):
            parse_gguf(
                renamed("gemma3", **{"gemma3.rope.dimension_count": None, f"gemma3.{key}": value})
            )

    def test_rows_of_llama_queries_are_put_back(self):
        layer = parse_gguf(GGUF_LLAMA).layers[0]
        rows = np.arange(64)  # as Hugging Face has them
        pairs = rows.reshape(4, 2, 8).swapaxes(1, 2).reshape(-1)  # as llama.cpp's converter does
        order = row_order("llama", "attn_q", layer)
        assert order is not None
        np.testing.assert_array_equal(pairs[order], rows)
        keys = row_order("llama", "attn_k", layer)
        assert keys is not None
        assert len(keys) == 32
        assert row_order("llama", "attn_v", layer) is None
        assert row_order("qwen2", "attn_q", layer) is None

    def test_openelm_has_one_matrix_for_queries_keys_and_values(self):
        assert tensor_names("openelm").qkv == ("attn_qkv",)
        assert tensor_names("llama").qkv == ("attn_q", "attn_k", "attn_v")
