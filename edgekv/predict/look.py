"""Look twice: where the last token of a prompt looks, its KV is computed after all.

    predict ─▶ window over predicted KV ─▶ where do the predicted layers' heads look? ─▶ these rows,
                                           and the window again, through all layers

The layers below, whose KV is exact, do not know yet what will matter; those above do, even over
predicted KV, and a few rows are enough (measured: see docs/prediction.md). What is computed so read
predicted KV itself, so it is not exact.
"""

import mlx.core as mx
import numpy as np

from edgekv.kv.provenance import Span
from edgekv.models.attention import KVView, Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder

SHARE = 0.05  # of a prompt's predicted tokens that are computed
MORE = 3.0  # times as many, where that is only done if there is hope (see `gate`)
# Last rows of a prompt that run again over what was computed. More rows would cost more and give
# no better answers (measured: see docs/prediction.md).
ROWS_AGAIN = 16
_CHUNK = 2  # tokens that are chosen together (measured: see docs/prediction.md)
_SMOOTH = 5  # a passage matters around what is looked at


class Glance:
    """Keeps the queries of some rows of a pass, by layer from the `first_layer` on. A `Taps`."""

    def __init__(self, first: int, num_rows: int = 1, *, first_layer: int = 0) -> None:
        self._rows, self._first_layer = slice(first, first + num_rows), first_layer
        self._queries: dict[int, mx.array] = {}

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """Nothing is taken of these."""

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each, before norms and RoPE."""
        del keys, values
        if layer >= self._first_layer:
            self._queries[layer] = queries[self._rows]

    def weights(self, base: Decoder, view: KVView) -> mx.array:
        """How much each row looks at each token up to the last row, `(rows, T)` float32.

        Of each layer the head that looks most, and of these the mean. `view` stands at the first
        row, and has the keys that the pass read.
        """
        num_rows = self._rows.stop - self._rows.start
        num_tokens, batch = view.offset + num_rows, PackedBatch([Segment(view, num_rows)])
        rows = mx.arange(view.offset, num_tokens)[:, None]
        tokens = mx.arange(num_tokens)[None]
        most = []
        for layer, queries in self._queries.items():
            keys, _ = view.read(layer, num_tokens)
            window = base.config.layers[layer].sliding_window
            hidden = tokens > rows
            if window is not None:
                hidden = hidden | (tokens <= rows - window)
            attention = base.attention(layer)
            rotated = attention.finish_queries(queries, batch) * attention.scale
            grouped = rotated.swapaxes(0, 1)
            grouped = grouped.reshape(keys.shape[0], -1, rotated.shape[-1])
            scores = (grouped @ keys.swapaxes(1, 2)).reshape(-1, num_rows, num_tokens)
            scores = mx.where(hidden, -mx.inf, scores.astype(mx.float32))
            most.append(mx.softmax(scores, axis=-1).max(axis=0))
        return base.group.all_max(mx.stack(most)).mean(axis=0)


def hopeful_share(look: float) -> float:
    """What part is computed where there is hope, if `look` is what would be always."""
    return min(1.0, MORE * look)


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
