"""Shapes, capacity classes and bytes of KV."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kv.layout import (
    BLOCK_TOKENS,
    NOTHING,
    PAGE_BYTES,
    WINDOW_BACK_TOKENS,
    WINDOW_GROUP_TOKENS,
    Heads,
    KVLayout,
    PoolSnapshot,
    StateArray,
)
from edgekv.sched.memory import tokens_max


def any_heads(heads):
    return any(layer.num for layer in heads)


some_heads = st.builds(
    lambda count, dim, latent: Heads(count, dim, 0 if latent else dim),
    st.integers(1, 16),
    st.sampled_from([8, 16, 48, 64, 80, 96, 128, 256]),
    st.booleans(),
)
heads = st.lists(st.one_of(some_heads, st.just(NOTHING)), min_size=1, max_size=4).filter(any_heads)
states = st.builds(
    lambda rows, numbers: (((StateArray((rows, numbers), "float32"),),)),
    st.integers(1, 64),
    st.integers(1, 4096),
)
layouts = st.builds(
    lambda heads, dtype_bytes, context_max, states, windows: KVLayout(
        heads=tuple(heads),
        dtype_bytes=dtype_bytes,
        context_max=context_max,
        states=states,
        windows=() if states else tuple(windows[: len(heads)]),
    ),
    heads,
    st.sampled_from([2, 4]),
    st.integers(1, 200_000),
    st.one_of(st.just(()), states),
    st.one_of(st.just(()), st.lists(st.sampled_from([0, 16, 4096]), min_size=4, max_size=4)),
)

SMOLLM2 = KVLayout(heads=(Heads(3, 64, 64),) * 30, dtype_bytes=4, context_max=8192)


def test_figures_of_a_known_model():
    """SmolLM2-135M in f32: 30 layers, 3 key-value heads of 64."""
    assert SMOLLM2.num_layers == 30
    assert SMOLLM2.layer_token_bytes(0) == 2 * 3 * 64 * 4
    assert SMOLLM2.token_bytes == 46_080
    assert SMOLLM2.capacity_bytes(64) == 64 * 46_080
    assert SMOLLM2.granule_tokens == 64


def test_layers_may_differ():
    layout = KVLayout(heads=(Heads(3, 64, 64), Heads(5, 64, 64)), dtype_bytes=2, context_max=2048)
    assert layout.token_bytes == 2 * 2 * 64 * (3 + 5)
    assert layout.layer_token_bytes(1) == 2 * 2 * 64 * 5


def test_layers_may_cache_less():
    layout = KVLayout(heads=(Heads(1, 576, 0), NOTHING), dtype_bytes=2, context_max=2048)
    assert layout.token_bytes == layout.layer_token_bytes(0) == 2 * 576
    assert layout.layer_token_bytes(1) == 0
    assert layout.granule_tokens == 128


def test_a_state_is_counted_once_a_session():
    """Qwen 3.5's 4B in 16 bits: 8 layers with KV, 24 with a state of 2 MiB and a little."""
    delta = (StateArray((3, 8192), "bfloat16"), StateArray((32, 128, 128), "float32"))
    layout = KVLayout(
        heads=(NOTHING, NOTHING, NOTHING, Heads(4, 256, 256)) * 8,
        dtype_bytes=2,
        context_max=1 << 18,
        states=(delta, delta, delta, ()) * 8,
    )
    assert layout.token_bytes == 32 << 10
    assert layout.state_bytes == 24 * (48 << 10) + 24 * (2 << 20)
    assert layout.capacity_bytes(0) == 0
    assert layout.capacity_bytes(64) == 64 * layout.token_bytes + 4 * layout.state_bytes
    more = layout.capacity_bytes(128) - layout.capacity_bytes(64)
    assert more == 64 * layout.token_bytes
    assert layout.growth_bytes(64, 128) == more + 64 * 4096
    assert layout.snapshot_tokens == 1024
    assert layout.rows_max == 2048


@pytest.mark.parametrize(
    ("numbers", "tokens"), [(1, 256), (256 * 128, 256), (256 * 128 + 1, 272), (1 << 20, 1024)]
)
def test_snapshots_take_no_more_than_the_kv_between_them(numbers, tokens):
    layout = KVLayout(
        heads=(Heads(1, 64, 64),),
        dtype_bytes=4,
        context_max=1 << 14,
        states=((StateArray((numbers,), "float32"),),),
    )
    assert layout.snapshot_tokens == tokens


def test_without_a_state_there_are_no_snapshots_and_no_bound():
    assert SMOLLM2.snapshot_tokens == SMOLLM2.state_bytes == SMOLLM2.states_bytes == 0
    assert SMOLLM2.rows_max == SMOLLM2.context_max


@settings(max_examples=150, derandomize=True, deadline=None)
@given(layouts)
def test_a_granule_makes_every_buffer_whole_pages(layout):
    granule = layout.granule_tokens
    assert granule % BLOCK_TOKENS == 0
    for count, *dims in layout.heads:
        assert all(granule * count * dim * layout.dtype_bytes % PAGE_BYTES == 0 for dim in dims)
    smaller = [n for n in range(BLOCK_TOKENS, granule, BLOCK_TOKENS) if granule % n == 0]
    assert not any(
        all(n * h * d * layout.dtype_bytes % PAGE_BYTES == 0 for h, *ds in layout.heads for d in ds)
        for n in smaller
    ), "no smaller one would do"


@settings(max_examples=200, derandomize=True, deadline=None)
@given(layouts, st.data())
def test_a_capacity_holds_what_it_is_for(layout, data):
    num_tokens = data.draw(st.integers(1, layout.context_max))
    granule = layout.granule_tokens
    capacity = layout.capacity_for(num_tokens)
    assert capacity >= num_tokens
    assert capacity % granule == 0
    assert capacity <= math.ceil(layout.context_max / granule) * granule
    needed = math.ceil(num_tokens / granule)
    assert (capacity // granule - needed) * 3 <= capacity // granule, "a third unused at most"
    if num_tokens > 1:
        assert layout.capacity_for(num_tokens - 1) <= capacity
    if capacity <= layout.context_max:
        assert layout.capacity_for(capacity) == capacity


def test_there_are_few_classes():
    layout = KVLayout(heads=(Heads(8, 128, 128),), dtype_bytes=2, context_max=131_072)
    classes = {layout.capacity_for(n) for n in range(1, layout.context_max + 1, 7)}
    granules = sorted(c // layout.granule_tokens for c in classes)
    assert granules[:11] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert len(granules) <= 2 * math.log2(131_072 / layout.granule_tokens) + 2


@pytest.mark.parametrize("num_tokens", [0, -1, 8193])
def test_no_capacity_for_what_cannot_be(num_tokens):
    with pytest.raises(AssertionError):
        SMOLLM2.capacity_for(num_tokens)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(layouts, st.integers(0, 1 << 33))
def test_tokens_max_is_the_most_a_pool_can_hold(layout, budget_bytes):
    most = tokens_max(layout, budget_bytes)
    assert 0 <= most <= layout.context_max
    if most:
        assert layout.capacity_bytes(layout.capacity_for(most)) <= budget_bytes
    if most < layout.context_max:
        assert layout.capacity_bytes(layout.capacity_for(most + 1)) > budget_bytes


def test_a_snapshot_counts_free_buffers_as_allocated_and_as_available():
    pool = PoolSnapshot(budget_bytes=100, used_bytes=40, free_bytes=25, peak_bytes=80)
    assert pool.allocated_bytes == 65
    assert pool.available_bytes == 60


def gemma3(context_max):
    """Gemma 3 270M in f32: every sixth layer sees all, the others 512 tokens."""
    windows = (512, 512, 512, 512, 512, 0) * 3
    heads = (Heads(1, 256, 256),) * 18
    return KVLayout(heads=heads, dtype_bytes=4, context_max=context_max, windows=windows)


def test_windows_take_what_they_reach_and_a_group():
    layout = gemma3(32_768)
    assert layout.token_bytes == 36_864
    assert layout.windowed_token_bytes == 30_720
    assert layout.window_slots == 512 + WINDOW_BACK_TOKENS + WINDOW_GROUP_TOKENS
    theory = (3 * 8192 + 15 * (512 + WINDOW_GROUP_TOKENS)) * 2048
    assert 1 <= layout.capacity_bytes(8192) / theory < 1.1
    saved = 8192 * layout.token_bytes - layout.capacity_bytes(8192)
    assert 0.99 < saved / (8192 * layout.token_bytes - theory) <= 1


@pytest.mark.parametrize(
    ("num_tokens", "base", "first"),
    [(0, 0, 0), (576, 0, 0), (577, 1, 0), (832, 256, 0), (833, 257, 257), (9000, 8424, 8424)],
)
def test_what_windows_keep(num_tokens, base, first):
    layout = gemma3(32_768)
    assert layout.window_base(num_tokens) == base
    assert layout.first_slot(num_tokens) == first
    assert layout.rows_max == WINDOW_GROUP_TOKENS


def test_growing_copies_no_layer_that_does_not_grow():
    layout = gemma3(32_768)
    more = layout.capacity_bytes(4096) - layout.capacity_bytes(2048)
    assert more == 3 * 2048 * 2048
    assert layout.growth_bytes(2048, 4096) == more + 2048 * 2048
    assert layout.growth_bytes(512, 768) == 18 * 256 * 2048 + 512 * 2048
