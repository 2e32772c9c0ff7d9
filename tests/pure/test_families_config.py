"""`config.json` → DecoderConfig, and what is refused with which words."""

import math

import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from published_configs import ANY_VALUE, PUBLISHED, published

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families import FAMILIES, parse_config

LLAMA_3_2_1B = published("meta-llama/Llama-3.2-1B")
MISTRAL_7B = published("mistralai/Mistral-7B-v0.1")
QWEN2_0_5B = published("Qwen/Qwen2-0.5B")
QWEN3_0_6B = published("Qwen/Qwen3-0.6B")
GEMMA3_1B = published("google/gemma-3-1b-it")
GEMMA3_4B = published("google/gemma-3-4b-it")
OPENELM_270M = published("apple/OpenELM-270M")


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
        assert not any((config.qkv_bias, config.out_bias, config.mlp_bias))
        assert config.qk_norm == "none"
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
        windowed = parse(QWEN2_0_5B | {"use_sliding_window": True, "max_window_layers": 21})
        assert [layer.sliding_window for layer in windowed.layers] == [None] * 21 + [131072] * 3

    def test_qwen3_heads_are_wider_than_the_hidden_size(self):
        config = parse(QWEN3_0_6B)
        assert config.qk_norm == "heads"
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
        config=st.sampled_from([config for _, config in PUBLISHED.values()]),
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
