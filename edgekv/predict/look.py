"""Look twice: where the last token of a prompt looks, its KV is computed after all.

    predict ─▶ window over predicted KV ─▶ where do the predicted layers' heads look? ─▶ these rows,
                                           and the window again, through all layers

The layers below, whose KV is exact, do not know yet what will matter; those above do, even over
predicted KV, and a few rows are enough (measured: see docs/prediction.md). What is computed so read
predicted KV itself, so it stays marked as predicted.
"""

import mlx.core as mx
import numpy as np

from edgekv.models.attention import KVView, Segment
from edgekv.models.decoder import Decoder, PackedBatch

SHARE = 0.05  # of a prompt's predicted tokens that are computed
_CHUNK = 8  # tokens that are chosen together
_SMOOTH = 5  # a passage matters around what is looked at

Span = tuple[int, int]  # tokens, half-open


class Glance:
    """Keeps the queries of one row of a pass, by layer. A `Taps`."""

    def __init__(self, row: int) -> None:
        self._row = row
        self._queries: dict[int, mx.array] = {}

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """Nothing is taken of these."""

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each, before norms and RoPE."""
        del keys, values
        self._queries[layer] = queries[self._row : self._row + 1]

    def weights(self, base: Decoder, view: KVView) -> mx.array:
        """How much the row looks at each token up to itself, `(T,)` float32.

        Of each layer the head that looks most, and of these the mean. `view` stands at the row, and
        has the keys that the pass read.
        """
        position, batch = view.offset, PackedBatch([Segment(view, 1)])
        total = mx.zeros((position + 1,), dtype=mx.float32)
        for layer, queries in self._queries.items():
            keys, _ = view.read(layer, position + 1)
            window = base.config.layers[layer].sliding_window
            first = 0 if window is None else max(0, position + 1 - window)
            rotated = base.finish_queries(layer, queries, batch)[0] * base.scale(layer)
            grouped = rotated.reshape(keys.shape[0], -1, rotated.shape[-1])
            scores = grouped @ keys[:, first:].swapaxes(1, 2)
            looks = mx.softmax(scores.astype(mx.float32), axis=-1).max(axis=(0, 1))
            total = total + mx.concatenate([mx.zeros((first,), dtype=mx.float32), looks])
        return total / len(self._queries)


def chosen(weights: np.ndarray, span: Span, share: float) -> list[Span]:
    """Which of a span's tokens are looked at most: so large a share of them, one chunk at least."""
    start, end = span
    smooth = np.convolve(weights, np.ones(_SMOOTH) / _SMOOTH, mode="same")[start:end]
    num_chunks = -(-len(smooth) // _CHUNK)
    padded = np.zeros(num_chunks * _CHUNK)
    padded[: len(smooth)] = smooth
    count = max(1, round(share * num_chunks))
    best = np.argsort(-padded.reshape(num_chunks, _CHUNK).max(axis=1), kind="stable")[:count]
    spans: list[Span] = []
    for chunk in sorted(int(index) for index in best):
        first = start + chunk * _CHUNK
        last = min(first + _CHUNK, end)
        if spans and spans[-1][1] == first:
            first = spans.pop()[0]
        spans.append((first, last))
    return spans
