"""What a rank has of a model, by the sizes of models that people run, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_configs import published

from edgekv.errors import UnsupportedModel
from edgekv.kv.layout import Heads
from edgekv.models.config import (
    ConvConfig,
    DecoderConfig,
    DeltaConfig,
    ExpertsConfig,
    Fields,
    LatentConfig,
    LayerConfig,
)
from edgekv.models.families import parse_config
from edgekv.models.parts import Axis, Part, beside


def layer_of(**changes):
    plain = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 16, "ffn_size": 48, "rope": None}
    return LayerConfig(**{**plain, **changes})


def config_of(*layers, **changes) -> DecoderConfig:
    plain = {"hidden_size": 64, "vocab_size": 100, "context_max": 64, "norm_eps": 1e-5}
    return DecoderConfig(family="test", layers=layers, attention_scale=1.0, **{**plain, **changes})


def part(config: DecoderConfig, rank: int, size: int) -> DecoderConfig:
    return Part(rank, size).config(config, "model")


class TestAxis:
    def test_what_is_whole_has_no_index(self):
        axis = Axis.of(range(4), 4, 8)
        assert (axis.size, axis.count, axis.index, axis.is_part) == (32, 32, None, False)

    def test_heads_of_a_part(self):
        axis = Axis.of(range(1, 3), 4, 8)
        assert (axis.size, axis.count, axis.is_part) == (32, 16, True)
        np.testing.assert_array_equal(axis.places, np.arange(8, 24))

    def test_side_by_side(self):
        axis = beside(Axis.of(range(1, 2), 2, 3), Axis(2), Axis.of(range(1), 2))
        assert axis.size == 10
        np.testing.assert_array_equal(axis.places, [3, 4, 5, 6, 7, 8])
        assert beside(Axis(2), Axis(3)).index is None

    def test_in_a_file_of_another_order(self):
        order = np.array([4, 0, 3, 1, 5, 2])
        np.testing.assert_array_equal(Axis.of(range(1, 2), 2, 3).through(order).places, [1, 5, 2])
        turned = Axis(6).through(order)
        assert not turned.is_part
        np.testing.assert_array_equal(turned.places, order)


class TestLocalNumbers:
    def test_one_rank_has_all(self):
        config = config_of(layer_of())
        assert part(config, 0, 1) is config

    def test_heads_and_channels(self):
        local = part(config_of(layer_of()), 1, 2)
        layer = local.layers[0]
        assert (layer.num_heads, layer.num_kv_heads, layer.ffn_size) == (4, 2, 24)
        assert (local.hidden_size, local.vocab_size) == (64, 100), "the stream is whole on each"
        assert local.kv_heads == (Heads(2, 16, 16),)

    @pytest.mark.parametrize(("num_kv_heads", "expected"), [(1, [0] * 4), (2, [0, 0, 1, 1])])
    def test_fewer_key_value_heads_than_ranks_are_on_several(self, num_kv_heads, expected):
        layer = layer_of(num_kv_heads=num_kv_heads)
        taken = [Part(rank, 4).layer(layer) for rank in range(4)]
        assert [list(one.kv_heads) for one in taken] == [[head] for head in expected]
        # Queries stay with the head that they look at.
        each = layer.num_heads // num_kv_heads
        assert all(head // each in one.kv_heads for one in taken for head in one.heads)
        assert part(config_of(layer), 3, 4).kv_heads == (Heads(1, 16, 16),)

    def test_a_latent_is_on_all_ranks(self):
        latent = LatentConfig(rank=32, query_rank=None, plain_dim=16, rope_dim=8, value_dim=20)
        local = part(config_of(layer_of(num_kv_heads=8, latent=latent)), 1, 4)
        assert (local.layers[0].num_heads, local.layers[0].num_kv_heads) == (2, 2)
        assert local.kv_heads == (Heads(1, 40, 0),)

    def test_states_of_recurrent_layers(self):
        delta = DeltaConfig(
            num_key_heads=2, num_value_heads=8, key_dim=16, value_dim=24, conv_size=4
        )
        conv = ConvConfig(size=3, num_channels=64)
        # A layer that does not attend may say what it likes of heads: here what cannot be cut.
        config = config_of(layer_of(delta=delta), layer_of(conv=conv, num_heads=3, num_kv_heads=0))
        local = part(config, 3, 4)
        assert local.layers[0].state_shapes == ((3, 2 * 16 + 2 * 24), (2, 24, 16))
        assert local.layers[1].state_shapes == ((2, 16),)
        taken = Part(3, 4).layer(config.layers[0])
        assert (taken.value_heads, taken.key_heads) == (range(6, 8), range(1, 2))

    def test_each_expert_is_cut(self):
        experts = ExpertsConfig(num_experts=5, num_chosen=2, ffn_size=24, shared_size=16)
        local = part(config_of(layer_of(ffn_size=0, experts=experts)), 0, 4).layers[0].experts
        assert local is not None
        assert (local.num_experts, local.num_chosen) == (5, 2)
        assert (local.ffn_size, local.shared_size) == (6, 4)


class TestChannelsInGroups:
    def widths(self, ffn_size: int, size: int, group_size: int) -> list[int]:
        parts = [Part(rank, size, group_size) for rank in range(size)]
        taken = [part.layer(layer_of(ffn_size=ffn_size)).ffn for part in parts]
        assert [i for one in taken for i in one] == list(range(ffn_size))
        assert all(one.start % group_size == 0 for one in taken)
        return [len(one) for one in taken]

    def test_evenly_where_groups_divide(self):
        assert self.widths(4864, 2, 64) == [2432] * 2

    def test_gpt_oss_s_experts_on_four_ranks(self):
        assert self.widths(2880, 4, 32) == [704, 736, 704, 736]

    def test_fewer_groups_than_ranks_are_refused(self):
        config = config_of(layer_of(ffn_size=64))
        with pytest.raises(UnsupportedModel, match="64 channels of an MLP in groups of 32") as it:
            Part(0, 4, 32).config(config, "model")
        assert it.value.hint == "2 ranks can"


@given(vocab_size=st.integers(1, 2000), size=st.integers(1, 16))
def test_each_token_is_on_one_rank(vocab_size, size):
    parts = [Part(rank, size).vocabulary(vocab_size) for rank in range(size)]
    assert [token for one in parts for token in one] == list(range(vocab_size))
    step = -(-vocab_size // size)
    assert all(len(one) == step for one in parts if one and one[-1] != vocab_size - 1)


class TestRefused:
    @pytest.mark.parametrize(
        ("layer", "what"),
        [
            (layer_of(num_heads=9, num_kv_heads=3), "9 heads and 3 key-value heads"),
            (layer_of(num_heads=9, num_kv_heads=1), "9 heads and 1 key-value head"),
            (layer_of(num_heads=6, num_kv_heads=3), "6 heads and 3 key-value heads"),
            (layer_of(ffn_size=45), "45 channels of an MLP"),
            (layer_of(conv=ConvConfig(size=3, num_channels=63)), "63 channels of a convolution"),
            (
                layer_of(
                    delta=DeltaConfig(
                        num_key_heads=3, num_value_heads=6, key_dim=8, value_dim=8, conv_size=4
                    )
                ),
                "6 value heads and 3 key heads",
            ),
            (
                layer_of(experts=ExpertsConfig(num_experts=4, num_chosen=1, ffn_size=33)),
                "33 channels of an expert",
            ),
            (
                layer_of(
                    experts=ExpertsConfig(num_experts=4, num_chosen=1, ffn_size=32, shared_size=5)
                ),
                "5 channels of a shared expert",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_does_not_divide_is_named(self, layer, what):
        with pytest.raises(UnsupportedModel) as raised:
            part(config_of(layer_of(), layer), 0, 2)
        assert str(raised.value).startswith(f"model: {what} cannot be cut for 2 ranks")

    def test_smollm2_is_told_which_number_will_do(self):
        layer = layer_of(num_heads=9, num_kv_heads=3, ffn_size=1536)
        with pytest.raises(UnsupportedModel, match="9 heads and 3 key-value heads") as raised:
            part(config_of(layer), 0, 2)
        assert raised.value.hint == "3 ranks can"
        assert part(config_of(layer), 2, 3).layers[0].num_heads == 3

    def test_or_that_none_will(self):
        with pytest.raises(UnsupportedModel) as raised:
            part(config_of(layer_of(ffn_size=47)), 0, 2)
        assert raised.value.hint == "no number up to 16 can"


@pytest.mark.parametrize(
    ("name", "able"),
    [
        ("meta-llama/Llama-3.2-1B", {2, 4, 8}),
        ("Qwen/Qwen2-0.5B", {2}),
        ("google/gemma-3-1b-it", {2, 4}),
        ("apple/OpenELM-270M", set()),
    ],
)
def test_published_models(name, able):
    config = parse_config(Fields(published(name), "config.json"))
    found = set()
    for size in (2, 3, 4, 8):
        try:
            parts = [part(config, rank, size) for rank in range(size)]
        except UnsupportedModel:
            continue
        found.add(size)
        assert all(one == parts[0] for one in parts), "ranks' shapes are alike"
    assert found == able
