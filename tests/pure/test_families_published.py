"""Published configurations of the larger families: what they mean, and what they cost."""

import math
from collections import Counter

import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from published_configs import ANY_VALUE
from published_families import PUBLISHED_FAMILIES, published_family, text_part

from edgekv.errors import EdgeKVError
from edgekv.kv.layout import NOTHING
from edgekv.models.config import (
    ConvConfig,
    DecoderConfig,
    DeltaConfig,
    ExpertsConfig,
    Fields,
    LatentConfig,
    PerLayerInputs,
    num_parameters,
)
from edgekv.models.families import parse_config

KIB = 1024


def parse(name: str) -> DecoderConfig:
    return parse_config(Fields(published_family(name), "config.json"))


def kv_bytes(config: DecoderConfig) -> int:
    """Of a token, in 16 bits."""
    return sum(h.num * (h.key_dim + h.value_dim) * 2 for h in config.kv_heads)


@pytest.mark.parametrize(
    ("name", "billions", "kv_kib"),
    [
        ("Qwen/Qwen3-30B-A3B", 30.5, 96),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46.7, 128),
        ("openai/gpt-oss-20b", 20.9, 48),
        ("google/gemma-2-2b-it", 2.6, 104),
        ("google/gemma-4-E2B-it", 4.6, 18),
        ("google/gemma-4-26B-A4B-it", 25.2, 220),
        ("Qwen/Qwen3.5-0.8B", 0.75, 12),
        ("Qwen/Qwen3.5-35B-A3B", 34.7, 20),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", 79.7, 24),
        ("zai-org/GLM-4.7-Flash", 29.9, 47 * 576 * 2 / KIB),
        ("mistralai/Ministral-3-3B-Instruct-2512", 3.4, 104),
        ("mistralai/Devstral-2-123B-Instruct-2512", 125, 352),
        ("microsoft/Phi-4-mini-instruct", 3.8, 128),
        ("HuggingFaceTB/SmolLM3-3B", 3.1, 72),
        ("ibm-granite/granite-3.3-8b-instruct", 8.2, 160),
        ("allenai/Olmo-3-7B-Instruct", 7.3, 512),
        ("LiquidAI/LFM2-1.2B", 1.17, 12),
    ],
)
def test_size_and_kv_are_what_their_cards_say(name, billions, kv_kib):
    config = parse(name)
    assert num_parameters(config) / 1e9 == pytest.approx(billions, rel=0.02)
    assert kv_bytes(config) / KIB == kv_kib


def test_all_are_known():
    assert len(PUBLISHED_FAMILIES) == 17
    for name in PUBLISHED_FAMILIES:
        assert parse(name).num_layers >= 16


def test_qwen3_moe_has_experts_everywhere_and_no_windows():
    layers = parse("Qwen/Qwen3-30B-A3B").layers
    assert {layer.experts for layer in layers} == {
        ExpertsConfig(num_experts=128, num_chosen=8, ffn_size=768)
    }
    assert {(layer.ffn_size, layer.sliding_window) for layer in layers} == {(0, None)}


def test_gpt_oss():
    config = parse("openai/gpt-oss-20b")
    assert [layer.sliding_window for layer in config.layers] == [128, None] * 12
    assert config.layers[0].experts == ExpertsConfig(
        num_experts=32, num_chosen=4, ffn_size=2880, router_bias=True, bias=True
    )
    assert (config.sinks, config.activation, config.qkv_bias) == (True, "clamped_silu", True)
    rope = config.layers[0].rope
    assert rope is not None
    assert rope.magnitude == pytest.approx(0.1 * math.log(32) + 1)
    # Not truncated: the first stretched pair is between whole ones, 8.09.
    factors = rope.wavelength_factors
    assert factors is not None
    assert [factor > 1 for factor in factors[7:11]] == [False, False, True, True]
    assert factors[9] == pytest.approx(1 / (1 - (9 - 8.0927) / (17.3980 - 8.0927) * 31 / 32), 1e-3)


def test_gemma4_e2b_shares_the_kv_of_its_last_layers_that_make_some():
    config = parse("google/gemma-4-E2B-it")
    assert config.kv_layers == 15
    assert Counter(layer.kv_from for layer in config.layers) == {None: 15, 13: 16, 14: 4}
    assert config.kv_heads[15:] == (NOTHING,) * 20
    assert {layer.ffn_size for layer in config.layers[:15]} == {6144}
    assert {layer.ffn_size for layer in config.layers[15:]} == {2 * 6144}
    assert [layer.head_dim for layer in config.layers[:5]] == [256] * 4 + [512]
    assert config.per_layer == PerLayerInputs(size=256, vocab_size=262_144)
    assert (config.attention_scale, config.logits_softcap) == (1.0, 30.0)
    rope = config.layers[4].rope
    assert rope is not None and rope.wavelength_factors is not None  # noqa: PT018
    assert rope.wavelength_factors == (1.0,) * 64 + (math.inf,) * 192


def test_gemma4_26b_has_experts_beside_and_keys_that_are_values():
    config = parse("google/gemma-4-26B-A4B-it")
    layers = config.layers
    assert {layer.experts for layer in layers} == {
        ExpertsConfig(num_experts=128, num_chosen=8, ffn_size=704, expert_scales=True, beside=True)
    }
    assert {(layer.num_kv_heads, layer.values_are_keys) for layer in layers[5::6]} == {(2, True)}
    assert {(layer.num_kv_heads, layer.values_are_keys) for layer in layers[:5]} == {(8, False)}
    assert config.per_layer is None


def test_qwen3_5_attends_in_every_fourth_layer():
    config = parse("Qwen/Qwen3.5-35B-A3B")
    assert [layer.recurrent for layer in config.layers] == [True, True, True, False] * 10
    assert config.layers[0].delta == DeltaConfig(
        num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, conv_size=4
    )
    assert config.layers[0].experts == ExpertsConfig(
        num_experts=256, num_chosen=8, ffn_size=512, shared_size=512, shared_gate=True
    )
    rope = config.layers[3].rope
    assert rope is not None
    assert (rope.base, rope.rotated) == (1e7, 64)
    assert config.tied_head is False
    assert parse("Qwen/Qwen3.5-0.8B").tied_head is True


def test_glm_caches_one_latent_a_layer():
    config = parse("zai-org/GLM-4.7-Flash")
    assert config.layers[0].latent == LatentConfig(
        rank=512, query_rank=768, plain_dim=192, rope_dim=64, value_dim=256
    )
    assert (config.layers[0].ffn_size, config.layers[0].experts) == (10_240, None)
    experts = config.layers[1].experts
    assert experts is not None
    assert (experts.scores, experts.scale, experts.shared_size) == ("sigmoid", 1.8, 1536)
    assert config.attention_scale == 1 / 16


def test_ministral_queries_grow_and_devstrals_do_not():
    config = parse("mistralai/Ministral-3-3B-Instruct-2512")
    assert config.query_growth == (16_384, 0.1)
    assert config.context_max == 262_144
    rope = config.layers[0].rope
    assert rope is not None
    assert rope.magnitude == 1.0
    assert parse("mistralai/Devstral-2-123B-Instruct-2512").query_growth is None


def test_phi_rotates_three_quarters_with_factors_of_the_context_it_is_opened_for():
    fields = Fields(published_family("microsoft/Phi-4-mini-instruct"), "config.json")
    for context, last in ((None, 32.0), (4096, 1.0)):
        layer = parse_config(fields, context).layers[0]
        assert layer.rope is not None and layer.rope.wavelength_factors is not None  # noqa: PT018
        assert (layer.head_dim, layer.rope.rotated) == (128, 96)
        assert layer.rope.wavelength_factors[-1] == last
        assert layer.rope.magnitude == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))


def test_every_fourth_layer_of_smollm3_knows_no_positions():
    layers = parse("HuggingFaceTB/SmolLM3-3B").layers
    assert [layer.rope is None for layer in layers] == [False, False, False, True] * 9


def test_granite_multiplies_everywhere():
    config = parse("ibm-granite/granite-3.3-8b-instruct")
    assert (config.embedding_scale, config.residual_scale) == (12.0, 0.22)
    assert (config.attention_scale, config.logits_scale) == (0.0078125, 1 / 16)


def test_only_olmo3s_global_layers_are_stretched():
    config = parse("allenai/Olmo-3-7B-Instruct")
    assert [layer.sliding_window for layer in config.layers] == [4096, 4096, 4096, None] * 8
    ropes = [layer.rope for layer in config.layers[2:4]]
    assert [rope is not None and rope.wavelength_factors is None for rope in ropes] == [True, False]
    assert (config.qk_norm, config.pre_norms, config.post_norms) == ("whole", False, True)


def test_lfm2_attends_in_six_layers():
    config = parse("LiquidAI/LFM2-1.2B")
    assert [i for i, layer in enumerate(config.layers) if layer.conv is None] == [
        2, 5, 8, 10, 12, 14,
    ]  # fmt: skip
    assert {layer.ffn_size for layer in config.layers} == {8192}
    assert config.layers[0].conv == ConvConfig(size=3, num_channels=2048)


_MORE_FIELDS = {
    *("layer_types", "mlp_layer_types", "no_rope_layers", "mlp_only_layers", "per_layer_config"),
    *("rope_scaling", "rope_parameters", "sliding_window", "num_kv_shared_layers", "head_dim"),
    *("n_group", "topk_group", "decoder_sparse_step", "full_attention_interval"),
}


@pytest.mark.slow
@fuzz(
    examples=300,
    name=st.sampled_from(sorted(PUBLISHED_FAMILIES)),
    data=st.data(),
    value=ANY_VALUE,
)
def test_any_value_in_any_field_is_parsed_or_refused(name, data, value):
    text = text_part(name)
    field = data.draw(st.sampled_from(sorted(text.keys() | _MORE_FIELDS)))
    raw = text | {field: value}
    whole = published_family(name)
    raw = whole | {"text_config": raw} if "text_config" in whole else raw
    try:
        config = parse_config(Fields(raw, "config.json"))
    except EdgeKVError:
        return
    assert config.num_layers >= 1
    assert math.isfinite(config.attention_scale)
    for index, layer in enumerate(config.layers):
        assert layer.kv_from is None or layer.kv_from < index
        assert layer.sliding_window is None or layer.sliding_window > 0
        assert layer.experts is None or layer.experts.num_chosen <= layer.experts.num_experts
        factors = () if layer.rope is None else layer.rope.wavelength_factors or ()
        assert all(factor > 0 for factor in factors)
