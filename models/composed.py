"""Attention composed of matrix products, for devices without a fused kernel for it."""

import mlx.core as mx

from edgekv.models.config import LayerConfig
from edgekv.models.exponential import softmax_parts

_MANY_SCORES = 4096  # from here on our exponential pays for its extra ops


def attend_row(query: mx.array, keys: mx.array, values: mx.array, layer: LayerConfig) -> mx.array:
    """One scaled query row `(num_heads, head_dim)` over all keys → `(1, num_heads * head_dim)`."""
    grouped = query.reshape(layer.num_kv_heads, -1, layer.head_dim)
    if layer.num_heads * keys.shape[1] < _MANY_SCORES:
        scores = grouped @ keys.swapaxes(-1, -2)
        return (mx.softmax(scores, axis=-1) @ values).reshape(1, -1)
    # Keys on the left: BLAS packs the right side, and the keys are much the larger.
    scores = (keys @ grouped.swapaxes(-1, -2)).swapaxes(-1, -2)
    weights, total = softmax_parts(scores)
    return ((weights @ values) / total).reshape(1, -1)


def attend_rows(
    queries: mx.array, keys: mx.array, values: mx.array, layer: LayerConfig
) -> mx.array:
    """Scaled query rows `(n, num_heads, head_dim)`, the last of which sees the last key.

    Returns:
        `(n, num_heads * head_dim)`.
    """
    n, num_keys = queries.shape[0], keys.shape[1]
    # Query heads of one key-value head side by side: one product for each key-value head.
    by_head = queries.swapaxes(0, 1).reshape(layer.num_kv_heads, -1, layer.head_dim)
    scores = (by_head @ keys.swapaxes(-1, -2)).reshape(layer.num_kv_heads, -1, n, num_keys)
    scores = _mask(scores, layer.sliding_window)
    weights, total = softmax_parts(scores)
    mixed = weights.reshape(layer.num_kv_heads, -1, num_keys) @ values
    out = mixed.reshape(layer.num_kv_heads, -1, n, layer.head_dim) / total
    return out.reshape(-1, n, layer.head_dim).swapaxes(0, 1).reshape(n, -1)


def _mask(scores: mx.array, window: int | None) -> mx.array:
    """Row i, at key num_keys - n + i, sees keys up to its own and not before its window."""
    n, num_keys = scores.shape[-2:]
    first = num_keys - n
    if window is None or num_keys <= window:
        # All rows see all keys before the first row's own, so only a square of n x n is masked.
        hidden = mx.triu(mx.full((n, n), -mx.inf), k=1)
        scores[..., first:] = scores[..., first:] + hidden
        return scores
    at, keys = mx.arange(first, num_keys)[:, None], mx.arange(num_keys)[None]
    return mx.where((keys <= at) & (keys > at - window), scores, -mx.inf)
