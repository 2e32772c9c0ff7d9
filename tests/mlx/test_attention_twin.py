"""Packed attention against its slow twin: every row, every key, one explicit mask, f64."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stepping import CPU_PROFILE

from edgekv.models.attention import Segment, attend
from edgekv.models.config import LayerConfig, RopeConfig

HEAD_DIM = 8


class OffsetOnly:
    """A view of which attention needs no more than the offset."""

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def write(self, layer, keys, values):
        raise AssertionError("attention must not touch the KV")

    def read(self, layer, num_tokens):
        raise AssertionError("attention must not touch the KV")


def naive(queries, keys, values, layer: LayerConfig, scale: float) -> np.ndarray:
    """`(n, heads, head_dim)` rows at the end of `(kv_heads, tokens, head_dim)` keys."""
    num_rows, num_keys = queries.shape[0], keys.shape[1]
    out = np.zeros(queries.shape)
    per_kv_head = layer.num_heads // layer.num_kv_heads
    for row in range(num_rows):
        position = num_keys - num_rows + row
        first = 0
        if layer.sliding_window is not None:
            first = max(0, position - layer.sliding_window + 1)
        seen = slice(first, position + 1)
        for head in range(layer.num_heads):
            kv_head = head // per_kv_head
            scores = keys[kv_head, seen] @ queries[row, head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values[kv_head, seen]
    return out.reshape(num_rows, -1)


def random_segment(index: int, rows: int, offset: int, layer: LayerConfig) -> list[np.ndarray]:
    """Queries, keys and values; the same whatever other segments there are."""
    generator = np.random.default_rng(index)
    kv_shape = (layer.num_kv_heads, rows + offset, HEAD_DIM)
    shapes = [(rows, layer.num_heads, HEAD_DIM), kv_shape, kv_shape]
    return [generator.standard_normal(shape).astype(np.float32) for shape in shapes]


def run_both(segments, *, num_kv_heads, group, window, device):
    """`segments` are (rows, offset) pairs; ours and the naive result, `(N, heads * head_dim)`."""
    layer = LayerConfig(
        num_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=HEAD_DIM,
        ffn_size=1,
        rope=RopeConfig(base=10_000.0),
        sliding_window=window,
    )
    parts = [random_segment(i, rows, at, layer) for i, (rows, at) in enumerate(segments)]
    ours = attend(
        mx.array(np.concatenate([queries for queries, _, _ in parts])),
        [(mx.array(keys), mx.array(values)) for _, keys, values in parts],
        [Segment(OffsetOnly(at), rows) for rows, at in segments],
        layer,
        0.3,
        device,
    )
    return np.array(ours), np.concatenate([naive(*part, layer, 0.3) for part in parts])


@pytest.mark.slow
@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(1, 24), st.integers(0, 40)), min_size=1, max_size=4),
    num_kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 3]),
    window=st.none() | st.integers(1, 30),
    fused=st.booleans(),
    tile_rows=st.sampled_from([1, 2, 7, 16, 1 << 20]),
)
def test_any_segments_any_window_any_tile(segments, num_kv_heads, group, window, fused, tile_rows):
    device = replace(CPU_PROFILE, fused_attention=fused, attention_tile_rows=tile_rows)
    ours, expected = run_both(
        segments, num_kv_heads=num_kv_heads, group=group, window=window, device=device
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("num_keys", [15, 16, 17, 40])
def test_around_the_edge_of_the_window(fused, rows, num_keys):
    """15, 16 and 17 keys at a window of 16: from where nothing is cut to where one key is."""
    device = replace(CPU_PROFILE, fused_attention=fused, attention_tile_rows=4)
    ours, expected = run_both(
        [(rows, num_keys - rows)], num_kv_heads=2, group=2, window=16, device=device
    )
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-6)


def test_a_segment_does_not_see_another():
    device = replace(CPU_PROFILE, attention_tile_rows=8)
    options = {"num_kv_heads": 2, "group": 2, "window": None, "device": device}
    alone, _ = run_both([(5, 7)], **options)
    together, _ = run_both([(5, 7), (1, 30), (12, 0)], **options)
    np.testing.assert_array_equal(together[:5], alone)
