"""`config.json` and GGUF metadata → DecoderConfig, and what is refused with which words."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families import FAMILIES, parse_config
from edgekv.models.gguf_config import SUPPORTED, row_order, tensor_names, to_hf_fields

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
PUBLISHED = [LLAMA_3_2_1B, MISTRAL_7B, QWEN2_0_5B, QWEN3_0_6B, GEMMA3_4B, OPENELM_270M]


def parse(config: dict[str, object], source: str = "config.json") -> DecoderConfig:
    return parse_config(Fields(config, source))


class TestPublishedModels:
    def test_llama(self):
        config = parse(LLAMA_3_2_1B)
        layer = config.layers[0]
        assert (config.num_layers, config.hidden_size, config.vocab_size) == (16, 2048, 128256)
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (32, 8, 64)
        assert layer.rope == RopeConfig(base=5e5, llama3=(32.0, 1.0, 4.0, 8192.0))
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
        assert config.layers[5].rope == RopeConfig(base=1_000_000.0, position_scale=1 / 8)
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

    @pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", "su", ""])
    def test_other_scalings_are_refused(self, kind):
        with pytest.raises(
            UnsupportedModel, match=r"config.json: rope_scaling: .*not supported"
        ) as e:
            parse(LLAMA_3_2_1B | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
        assert e.value.hint == "supported: default, linear, llama3"


class TestRefused:
    def test_an_unknown_model_type(self):
        with pytest.raises(UnsupportedModel, match=r"config.json: model_type 'mamba'") as e:
            parse({"model_type": "mamba"})
        for known in FAMILIES:
            assert known in e.value.hint

    @pytest.mark.parametrize(
        ("config", "change", "message"),
        [
            (LLAMA_3_2_1B, {"partial_rotary_factor": 0.5}, "partial rotary"),
            (LLAMA_3_2_1B, {"hidden_act": "gelu"}, "activation 'gelu'"),
            (LLAMA_3_2_1B, {"sliding_window": 8, "layer_types": ["full_attention"]}, "layer_types"),
            (MISTRAL_7B, {"layer_types": ["chunked_attention"] * 32}, "layer_types"),
            (OPENELM_270M, {"ffn_with_glu": False}, "MLP without gate"),
        ],
    )
    def test_what_edgekv_does_not_run(self, config, change, message):
        with pytest.raises(UnsupportedModel, match=message) as e:
            parse(config | change)
        assert "config.json" in str(e.value)
        assert e.value.hint

    def test_soft_capping_of_gemma2(self):
        text = dict(GEMMA3_4B["text_config"]) | {"final_logit_softcapping": 30.0}
        with pytest.raises(UnsupportedModel, match="soft-capping"):
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
    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(
        config=st.sampled_from(PUBLISHED),
        data=st.data(),
        value=st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=3)
            | st.sampled_from([0, -1, 0.0, 1 << 70, 10**400, "linear", "full_attention"]),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), inner)
            ),
            max_leaves=4,
        ),
    )
    def test_any_value_in_any_field_is_parsed_or_refused(self, config, data, value):
        name = data.draw(st.sampled_from(sorted(config.keys() | {"layer_types", "text_config"})))
        try:
            parsed = parse(config | {name: value})
        except EdgeKVError:
            return
        assert parsed.num_layers >= 1
        assert math.isfinite(parsed.attention_scale)


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


def parse_gguf(metadata: dict[str, object]) -> DecoderConfig:
    return parse(to_hf_fields(metadata, "model.gguf"), "model.gguf")


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
            "gemma3", **{"gemma3.block_count": 62, "gemma3.attention.key_length": 32}
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

    def test_a_mixture_of_experts(self):
        with pytest.raises(UnsupportedModel, match="experts"):
            parse_gguf(GGUF_LLAMA | {"llama.expert_count": 8})

    def test_rope_scalings(self):
        linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
        assert parse_gguf(GGUF_LLAMA | linear).layers[0].rope.position_scale == 0.25
        with pytest.raises(UnsupportedModel, match=r"model.gguf: rope scaling 'yarn'") as e:
            parse_gguf(GGUF_LLAMA | {"llama.rope.scaling.type": "yarn"})
        assert "linear" in e.value.hint

    def test_a_partly_rotated_head(self):
        with pytest.raises(UnsupportedModel, match=r"model.gguf: partial rotary"):
            parse_gguf(GGUF_LLAMA | {"llama.rope.dimension_count": 8})

    @pytest.mark.parametrize("field", ["embedding_length", "block_count", "attention.head_count"])
    def test_a_missing_field(self, field):
        with pytest.raises(CheckpointCorrupt, match=r"model.gguf: field .* is missing"):
            parse_gguf(GGUF_LLAMA | {f"llama.{field}": None})

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
