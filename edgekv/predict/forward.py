"""Whole sequences through a decoder outside any pool: for fitting, training and measuring.

What the engine does with predicted prompts, here in plain steps and without a scheduler.
"""

import mlx.core as mx

from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch, Taps
from edgekv.predict.features import Place, Recorder
from edgekv.predict.predictor import Predictor


class ArrayView:
    """KV of one sequence in plain arrays, written at `offset`. Differentiable."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.arrays: dict[int, tuple[mx.array, mx.array]] = {}

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put rows at the offset, over what stood there."""
        start, end = self.offset, self.offset + keys.shape[1]
        if layer in self.arrays:
            old_keys, old_values = self.arrays[layer]
            assert old_keys.shape[1] >= start, "a gap"
            keys = mx.concatenate([old_keys[:, :start], keys, old_keys[:, end:]], axis=1)
            values = mx.concatenate([old_values[:, :start], values, old_values[:, end:]], axis=1)
        self.arrays[layer] = (keys, values)

    def read(self, layer: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """The first `num_tokens` tokens' keys and values."""
        keys, values = self.arrays[layer]
        return keys[:, :num_tokens], values[:, :num_tokens]

    def copy(self, offset: int) -> "ArrayView":
        """A view of the same arrays, which goes its own way from `offset` on."""
        other = ArrayView(offset)
        other.arrays = dict(self.arrays)
        return other


def run(
    decoder: Decoder,
    token_ids: list[int],
    view: ArrayView,
    *,
    last_layer: int | None = None,
    taps: Taps | None = None,
) -> mx.array:
    """Tokens behind what the view holds, through the first layers → `(T, hidden)`."""
    batch = PackedBatch([Segment(view, len(token_ids))])
    hidden = decoder.embed(mx.array(token_ids, dtype=mx.uint32))
    hidden = decoder.run_layers(hidden, batch, last_layer=last_layer, taps=taps)
    view.offset += len(token_ids)
    return hidden


def predicted_kv(
    base: Decoder, predictor: Predictor, seen: dict[Place, mx.array], start: int, end: int
) -> dict[int, tuple[mx.array, mx.array]]:
    """Keys and values of the tokens `[start, end)` by layer, from a pass recorded from token 0."""
    return predictor.predict(base, seen, (0, end), start, predictor.trail(), ArrayView(start))


def predicted_context(
    base: Decoder,
    aux: Decoder,
    predictor: Predictor,
    token_ids: list[int],
    *,
    sinks: int,
    window: int,
) -> tuple[ArrayView, mx.array]:
    """KV of a text whose middle is predicted, and its last rows `(window, hidden)`, all layers.

    Its first `sinks` tokens are computed exactly, its last `window`, at least one, by the base over
    what was predicted. `aux` is what the predictor looks at; `base` itself for kind "self".
    """
    end = len(token_ids) - window
    assert 0 <= sinks <= end < len(token_ids)
    recorder, view, lower = Recorder(predictor.places), ArrayView(), ArrayView()
    if sinks:
        run(base, token_ids[:sinks], view)
    seen = token_ids if predictor.kind == "self" else token_ids[:end]
    hidden = run(aux, seen, lower, last_layer=predictor.depth, taps=recorder)
    for layer, pair in predicted_kv(base, predictor, recorder.seen, sinks, end).items():
        view.write(layer, *pair)
    view.offset = end
    if predictor.kind == "aux":
        return view, run(base, token_ids[end:], view)
    view.arrays |= lower.arrays
    batch = PackedBatch([Segment(view, window)])
    rows = base.run_layers(hidden[end:], batch, first_layer=predictor.depth)
    view.offset = len(token_ids)
    return view, rows
