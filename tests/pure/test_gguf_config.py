"""GGUF metadata → DecoderConfig and tensors, and what is refused with which words."""

import math
from collections.abc import Collection

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from published_configs import ANY_VALUE

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families import parse_config
from edgekv.models.gguf_config import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    SUPPORTED,
    field_names,
    row_order,
    tensor_names,
    to_hf_fields,
)

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
# What an architecture needs beside what all have.
MORE: dict[str, dict[str, object]] = {
    "qwen3moe": {
        "qwen3moe.expert_count": 6,
        "qwen3moe.expert_used_count": 2,
        "qwen3moe.expert_feed_forward_length": 48,
    },
    "gpt-oss": {
        "gpt-oss.expert_count": 6,
        "gpt-oss.expert_used_count": 2,
        "gpt-oss.expert_feed_forward_length": 48,
        "gpt-oss.attention.sliding_window": 16,
    },
    "qwen35": {
        "qwen35.ssm.group_count": 2,
        "qwen35.ssm.time_step_rank": 4,
        "qwen35.ssm.state_size": 16,
        "qwen35.ssm.inner_size": 96,
        "qwen35.ssm.conv_kernel": 4,
        "qwen35.rope.dimension_sections": [2, 1, 1, 0],
        "qwen35.full_attention_interval": 2,
    },
    "deepseek2": {
        "deepseek2.attention.kv_lora_rank": 32,
        "deepseek2.attention.key_length_mla": 24,
        "deepseek2.attention.value_length_mla": 20,
        "deepseek2.attention.key_length": 40,
        "deepseek2.attention.value_length": 32,
        "deepseek2.rope.dimension_count": 8,
        "deepseek2.expert_count": 8,
        "deepseek2.expert_used_count": 2,
        "deepseek2.expert_shared_count": 1,
        "deepseek2.expert_feed_forward_length": 48,
        "deepseek2.expert_gating_func": 2,
        "deepseek2.expert_weights_norm": True,
        "deepseek2.leading_dense_block_count": 1,
    },
    "gemma4": {
        "gemma4.attention.key_length": 32,
        "gemma4.attention.key_length_swa": 16,
        "gemma4.attention.sliding_window": 16,
        "gemma4.attention.sliding_window_pattern": [True, False],
        "gemma4.embedding_length_per_layer_input": 8,
        "gemma4.rope.dimension_count": 32,
    },
    "granite": {"granite.logit_scale": 0.5},
    "lfm2": {"lfm2.shortconv.l_cache": 3, "lfm2.attention.head_count_kv": [0, 2]},
}
GGUF_KEYS = (
    "attention.head_count_kv",
    "attention.recurrent_layers",
    "attention.shared_kv_layers",
    "attention.temperature_scale",
    "expert_gating_func",
    "expert_used_count",
    "full_attention_interval",
    "nextn_predict_layers",
    "rope.dimension_count",
    "ssm.inner_size",
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


STILL = 1e30
GEMMA4_ROPE = {ROPE_FREQS: [1.0] * 4 + [STILL] * 12}


def parse_gguf(
    metadata: dict[str, object], tensors: Collection[str] = ("blk.1.attn_v.weight",)
) -> DecoderConfig:
    factors = GEMMA4_ROPE if metadata["general.architecture"] == "gemma4" else None
    fields = to_hf_fields(metadata, "model.gguf", factors, tensors)
    names = field_names(str(metadata["general.architecture"]))
    return parse_config(Fields(fields, "model.gguf", names))


def renamed(arch: str, **changes: object) -> dict[str, object]:
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in GGUF_LLAMA.items()}
    return metadata | {"general.architecture": arch} | changes


def test_llama():
    config = parse_gguf(GGUF_LLAMA)
    assert (config.family, config.num_layers, config.vocab_size) == ("llama", 2, 300)
    assert config.layers[0].head_dim == 16
    assert config.context_max == 512


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3"])
def test_other_architectures_have_the_same_fields(arch):
    metadata = renamed(arch, **{f"{arch}.attention.key_length": 16})
    config = parse_gguf(metadata)
    assert config.family == arch
    assert config.hidden_size == 64


def test_the_vocabulary_may_be_counted_from_the_tokens():
    tokens = [str(i) for i in range(77)]
    metadata = GGUF_LLAMA | {"llama.vocab_size": None, "tokenizer.ggml.tokens": tokens}
    assert parse_gguf(metadata).vocab_size == 77


def test_gemma3_norms_are_as_stored():
    config = parse_gguf(renamed("gemma3", **{"gemma3.attention.key_length": 16}))
    assert config.norm_offset == 0.0
    assert config.attention_scale == 0.25


def test_gemma3_27b_scales_by_the_width_of_a_head():
    metadata = renamed(
        "gemma3",
        **{
            "gemma3.block_count": 62,
            "gemma3.attention.key_length": 32,
            "gemma3.rope.dimension_count": 32,
        },
    )
    assert parse_gguf(metadata).attention_scale == pytest.approx((64 / 4) ** -0.5)


def test_openelm_widths_come_back_exactly():
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


def test_an_unsupported_architecture():
    with pytest.raises(UnsupportedModel, match=r"model.gguf: GGUF architecture 'gemma3n'") as e:
        to_hf_fields({"general.architecture": "gemma3n"}, "model.gguf")
    for known in SUPPORTED:
        assert known in e.value.hint


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_group_count", 4),
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
def test_what_edgekv_does_not_run_is_named_with_its_value(key, value):
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
def test_linear_scaling(metadata, factor):
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
def test_yarn(more, magnitude):
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128} | more
    metadata = {f"llama.rope.scaling.{key}": value for key, value in yarn.items()}
    config = parse_gguf(GGUF_LLAMA | metadata)
    rope = config.layers[0].rope
    assert rope.magnitude == pytest.approx(magnitude)
    assert rope.wavelength_factors is not None
    assert (rope.wavelength_factors[0], rope.wavelength_factors[-1]) == (1.0, 4.0)
    assert config.context_max == 512


def test_longrope_is_in_two_tensors():
    factors = {ROPE_LONG: [2.0] * 8, ROPE_SHORT: [1.5] * 8}
    metadata = GGUF_LLAMA | {
        "llama.rope.scaling.original_context_length": 128,
        "llama.rope.scaling.attn_factor": 1.25,
    }
    fields = to_hf_fields(metadata, "model.gguf", factors)
    rope = parse_config(Fields(fields, "model.gguf")).layers[0].rope
    assert (rope.wavelength_factors, rope.magnitude) == ((2.0,) * 8, 1.25)


@pytest.mark.parametrize("field", ["embedding_length", "block_count", "attention.head_count"])
def test_a_missing_field_has_the_name_that_it_has_in_the_file(field):
    with pytest.raises(CheckpointCorrupt, match=rf"model.gguf: field 'llama\.{field}' is miss"):
        parse_gguf(GGUF_LLAMA | {f"llama.{field}": None})
    with pytest.raises(CheckpointCorrupt, match=rf"model.gguf: field 'llama\.{field}' is 'x'"):
        parse_gguf(GGUF_LLAMA | {f"llama.{field}": "x"})


@pytest.mark.slow
@fuzz(examples=300, arch=st.sampled_from(SUPPORTED), data=st.data())
def test_any_value_in_any_key_is_parsed_or_refused(arch, data):
    metadata = renamed(arch, **MORE.get(arch, {}))
    known = [key for key in metadata if "." in key]
    more = [f"{arch}.{key}" for key in GGUF_KEYS]
    for key in data.draw(st.lists(st.sampled_from(known + more), min_size=1, max_size=3)):
        metadata[key] = data.draw(ANY_VALUE)
    try:
        parsed = parse_gguf(metadata)
    except EdgeKVError:
        return
    assert parsed.num_layers >= 1
    ropes = [layer.rope for layer in parsed.layers if layer.rope is not None]
    assert all(math.isfinite(rope.magnitude) for rope in ropes)


@pytest.mark.parametrize(
    ("key", "value"), [("block_count", 10**400), ("attention.key_length", math.nan)]
)
def test_sizes_that_are_none(key, value):
    with pytest.raises(CheckpointCorrupt, match=rf"'gemma3\.{key}' is"):
        parse_gguf(
            renamed("gemma3", **{"gemma3.rope.dimension_count": None, f"gemma3.{key}": value})
        )


def test_rows_of_llama_queries_are_put_back():
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


def test_openelm_has_one_matrix_for_queries_keys_and_values():
    assert tensor_names("openelm").qkv == ("attn_qkv",)
    assert tensor_names("llama").qkv == ("attn_q", "attn_k", "attn_v")


def test_a_llama_has_no_windows():
    config = parse_gguf(GGUF_LLAMA | {"llama.attention.sliding_window": 16})
    assert {layer.sliding_window for layer in config.layers} == {None}


def test_windows_of_gemma3():
    window = {"gemma3.attention.sliding_window": 16, "gemma3.attention.key_length": 16}
    six = {"gemma3.block_count": 6} | window
    config = parse_gguf(renamed("gemma3", **six))
    assert [layer.sliding_window for layer in config.layers] == [16] * 5 + [None]
    three = parse_gguf(renamed("gemma3", **six, **{"gemma3.attention.sliding_window_pattern": 3}))
    assert [layer.sliding_window for layer in three.layers] == [16, 16, None] * 2
    flags = {"gemma3.attention.sliding_window_pattern": [True, False] * 3}
    listed = parse_gguf(renamed("gemma3", **six, **flags))
    assert [layer.sliding_window for layer in listed.layers] == [16, None] * 3
    none = parse_gguf(renamed("gemma3", **{"gemma3.attention.key_length": 16}))
    assert {layer.sliding_window for layer in none.layers} == {None}
    assert {layer.rope.base for layer in none.layers} == {10_000.0}


# --- the other architectures ---


def family(arch: str, **changes: object) -> DecoderConfig:
    """A minimal file of an architecture, parsed; `__` stands for a dot in a key."""
    own = {f"{arch}.{key.replace('__', '.')}": value for key, value in changes.items()}
    return parse_gguf(renamed(arch, **MORE.get(arch, {})) | own)


@pytest.mark.parametrize(
    ("arch", "model"),
    [
        *[("qwen3moe", "qwen3_moe"), ("gpt-oss", "gpt_oss"), ("gemma4", "gemma4")],
        *[("qwen35", "qwen3_5"), ("deepseek2", "glm4_moe_lite"), ("mistral3", "ministral3")],
        *[("phi3", "phi3"), ("smollm3", "smollm3"), ("granite", "granite"), ("olmo2", "olmo3")],
        ("gemma2", "gemma2"),
    ],
)
def test_architectures_of_families(arch, model):
    assert family(arch).family == model


def test_a_llama_with_experts_is_a_mixtral():
    config = family("llama", expert_count=8, expert_used_count=2)
    assert config.family == "mixtral"
    assert config.layers[0].experts.num_chosen == 2
    assert family("llama", expert_count=0).family == "llama"
    with pytest.raises(CheckpointCorrupt, match=r"'llama\.expert_used_count' is missing"):
        family("llama", expert_count=8)


def test_blocks_that_guess_ahead_are_not_counted():
    config = family("qwen3", block_count=3, nextn_predict_layers=1)
    assert config.num_layers == 2
    with pytest.raises(CheckpointCorrupt, match=r"qwen3\.nextn_predict_layers' is 2"):
        family("qwen3", nextn_predict_layers=2)


@pytest.mark.parametrize(("arch", "full"), [("gemma2", [1]), ("gpt-oss", [1]), ("olmo2", [3])])
def test_windows_are_where_llama_cpp_has_them(arch, full):
    """And where a list says; llama.cpp's `set_swa_pattern` and `load_swa_pattern`."""
    every = full[0] + 1
    config = family(arch, block_count=2 * every, attention__sliding_window=16)
    seen = [i for i, layer in enumerate(config.layers) if layer.sliding_window is None]
    assert seen == [full[0], full[0] + every]
    flags = {"attention__sliding_window_pattern": [False, True], "attention__sliding_window": 16}
    config = family(arch, **flags)
    assert [layer.sliding_window for layer in config.layers] == [None, 16]


def test_gemma2_has_a_window_without_a_key():
    config = family("gemma2")
    assert config.layers[0].sliding_window == 4096
    assert (config.attention_softcap, config.logits_softcap) == (50.0, 30.0)


def test_gemma2_27b_scales_by_the_width_of_a_head():
    assert family("gemma2", attention__key_length=16).attention_scale == 0.25
    big = family("gemma2", block_count=46, attention__key_length=32, rope__dimension_count=32)
    assert big.attention_scale == pytest.approx((64 / 4) ** -0.5)


def test_olmo_2_has_no_windows():
    assert {layer.sliding_window for layer in family("olmo2").layers} == {None}


def test_gpt_oss_stretches_between_whole_pairs_only_if_it_says_so():
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    keys = {f"rope__scaling__{key}": value for key, value in yarn.items()}
    wholes = family("qwen3", **keys).layers[0].rope.wavelength_factors
    exact = family("gpt-oss", **keys).layers[0].rope.wavelength_factors
    assert wholes is not None
    assert exact is not None
    assert wholes != exact
    assert family("gpt-oss").layers[0].rope == RopeConfig(base=10_000.0)


def test_gemma4():
    config = family("gemma4", attention__shared_kv_layers=0)
    local, full = config.layers
    assert (local.head_dim, local.sliding_window) == (16, 16)
    assert (full.head_dim, full.sliding_window) == (32, None)
    assert full.rope.wavelength_factors == (1.0,) * 4 + (math.inf,) * 12
    assert config.per_layer.size == 8
    assert not full.values_are_keys
    assert config.logits_softcap is None


def test_gemma4_has_no_values_where_there_is_no_tensor_of_them():
    heads = {"gemma4.attention.head_count_kv": [2, 1]}
    metadata = renamed("gemma4", **MORE["gemma4"]) | heads
    local, full = parse_gguf(metadata, ["blk.0.attn_v.weight"]).layers
    assert (local.num_kv_heads, local.values_are_keys) == (2, False)
    assert (full.num_kv_heads, full.values_are_keys) == (1, True)
    with pytest.raises(UnsupportedModel, match=r"gemma4\.attention\.head_count_kv \[2, 1\]"):
        parse_gguf(metadata)


@pytest.mark.parametrize(
    "factors", [[1.0] * 15, [1.0] * 4 + [8.0] * 12, [1.0, STILL] * 8], ids=["few", "8", "mixed"]
)
def test_gemma4_s_rope_is_proportional_or_refused(factors):
    metadata = renamed("gemma4", **MORE["gemma4"])
    with pytest.raises(UnsupportedModel, match=r"model.gguf: rope_freqs.weight \[1"):
        to_hf_fields(metadata, "model.gguf", {ROPE_FREQS: factors})
    with pytest.raises(CheckpointCorrupt, match=r"model.gguf: tensor 'rope_freqs.weight' is miss"):
        to_hf_fields(metadata, "model.gguf")


def test_wide_layers_of_gemma4_are_those_that_share():
    shared = {"block_count": 4, "attention__sliding_window_pattern": [True, False] * 2}
    shared |= {"attention__shared_kv_layers": 2, "attention__head_count_kv": 2}
    config = family("gemma4", **shared, feed_forward_length=[96, 96, 192, 192])
    assert [layer.ffn_size for layer in config.layers] == [96, 96, 192, 192]
    assert [layer.kv_from for layer in config.layers] == [None, None, 0, 1]
    with pytest.raises(
        UnsupportedModel, match=r"gemma4\.feed_forward_length \[96, 192, 192, 192\]"
    ):
        family("gemma4", **shared, feed_forward_length=[96, 192, 192, 192])


def test_part_of_a_head_is_rotated():
    for head_dim, rotated in ((16, 16), (16, 12), (44, 30)):
        keys = {"attention__key_length": head_dim, "rope__dimension_count": rotated}
        rope = family("phi3", **keys).layers[0].rope
        assert (rope.rotated or head_dim) == rotated
    assert family("phi3", attention__sliding_window=0).layers[0].sliding_window is None
    assert family("phi3", attention__sliding_window=9).layers[0].sliding_window == 9


def test_granite_multiplies_by_what_is_not_zero():
    config = family("granite", residual_scale=0.5, attention__scale=0.0)
    assert config.residual_scale == 0.5
    assert config.attention_scale == 0.25
    assert config.embedding_scale == 1.0
    assert config.logits_scale == 2.0


def test_ministral_3_s_queries_grow():
    yarn = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    keys = {f"rope__scaling__{key}": value for key, value in yarn.items()}
    config = family(
        "mistral3",
        **keys,
        rope__scaling__yarn_log_multiplier=1.0,
        attention__temperature_scale=0.1,
    )
    assert config.query_growth == (128, 0.1)
    assert config.layers[0].rope.magnitude == 1.0
    plain = family("mistral3", **keys)
    assert plain.query_growth is None
    assert plain.layers[0].rope.magnitude == pytest.approx(0.1 * math.log(4) + 1)
    unstretched = family("mistral3", attention__temperature_scale=0.1)
    assert unstretched.query_growth == (512, 0.1)


def test_delta_layers():
    config = family("qwen35")
    assert config.layers[0].delta.value_dim == 24
    assert [layer.delta is None for layer in config.layers] == [False, True]
    listed = family("qwen35", attention__recurrent_layers=[False, True])
    assert [layer.delta is None for layer in listed.layers] == [True, False]
    with pytest.raises(CheckpointCorrupt, match=r"'qwen35\.ssm\.inner_size' is 97"):
        family("qwen35", ssm__inner_size=97)


def test_latent_attention():
    config = family("deepseek2", rope__scaling__type="none")
    latent = config.layers[0].latent
    assert (latent.rank, latent.plain_dim, latent.rope_dim, latent.value_dim) == (32, 16, 8, 20)
    assert config.layers[0].experts is None
    assert config.layers[1].experts.scores == "sigmoid"
    with pytest.raises(UnsupportedModel, match=r"deepseek2\.expert_gating_func 1"):
        family("deepseek2", expert_gating_func=None)
    with pytest.raises(CheckpointCorrupt, match=r"'deepseek2\.rope\.dimension_count' is 24"):
        family("deepseek2", rope__dimension_count=24)


def test_glm_4_7_flash_is_known_without_its_gating_function():
    keys = {"block_count": 47, "vocab_size": 154_880, "expert_gating_func": None}
    assert family("deepseek2", **keys).layers[1].experts.scores == "sigmoid"


@pytest.mark.parametrize("arch", ["llama", "mistral3", "smollm3", "granite"])
def test_rotary_pairs_are_side_by_side(arch):
    assert row_order(arch, "attn_q", family(arch).layers[0]) is not None


def test_value_heads_of_qwen35_are_put_back():
    layer = family("qwen35").layers[0]
    np.testing.assert_array_equal(row_order("qwen35", "ssm_a", layer), [0, 2, 1, 3])
    rows = np.arange(64 + 96).tolist()
    # Two key heads of 16, queries and keys; then as many values, of 24, of either key head in turn.
    grouped = [rows[64 + 24 * head : 88 + 24 * head] for head in range(4)]
    tiled = rows[:64] + grouped[0] + grouped[2] + grouped[1] + grouped[3]
    order = row_order("qwen35", "attn_qkv", layer)
    assert [tiled[i] for i in order] == rows
    assert row_order("qwen35", "ssm_norm", layer) is None
    assert row_order("qwen3next", "ssm_a", layer) is None


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        ("qwen3moe", "expert_gating_func", 2),
        ("qwen3moe", "expert_group_count", 4),
        ("qwen3moe", "expert_weights_scale", 2.5),
        ("qwen3moe", "expert_weights_norm", False),
        ("qwen3moe", "leading_dense_block_count", 1),
        ("gpt-oss", "swiglu_clamp_exp", [7.0, 0.0]),
        ("gemma2", "rope.freq_base_swa", 5.0),
        ("gemma3", "final_logit_softcapping", 30.0),
        ("gemma4", "rope.dimension_count_swa", 8),
        ("qwen3", "attention.recurrent_layers", [True, False]),
        ("qwen3", "attention.shared_kv_layers", 1),
        ("granite", "rope.scaling.finetuned", False),
        ("granite", "deepstack_mapping", [-1, 0]),
        ("lfm2", "attention.sliding_window", 16),
        ("lfm2", "attention.head_count_kv", [1, 2]),
        ("deepseek2", "attention.temperature_scale", 0.1),
    ],
)
def test_what_an_architecture_does_not_run_is_named_with_its_value(arch, key, value):
    with pytest.raises(UnsupportedModel) as e:
        family(arch, **{key.replace(".", "__"): value})
    assert f"model.gguf: {arch}.{key} {value!r}" in str(e.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window_pattern", [True]),
        ("attention.sliding_window_pattern", [True, 2]),
        ("attention.sliding_window_pattern", None),
        ("feed_forward_length", [96]),
        ("feed_forward_length", [96, -1]),
    ],
)
def test_lists_that_are_not_by_layer(key, value):
    with pytest.raises(CheckpointCorrupt, match=rf"'gemma4\.{key}' is"):
        family("gemma4", **{key.replace(".", "__"): value})
