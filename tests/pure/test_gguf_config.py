"""GGUF metadata → DecoderConfig and tensors, and what is refused with which words."""

import math

import numpy as np
import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from published_configs import ANY_VALUE

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models.config import DecoderConfig, Fields, RopeConfig
from edgekv.models.families import parse_config
from edgekv.models.gguf_config import (
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
    fields = to_hf_fields(metadata, "model.gguf")
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
@fuzz(examples=150, arch=st.sampled_from(["llama", "qwen2", "qwen3", "gemma3"]), data=st.data())
def test_any_value_in_any_key_is_parsed_or_refused(arch, data):
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
