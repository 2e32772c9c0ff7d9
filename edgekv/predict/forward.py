"""Whole sequences through a decoder outside any pool: for fitting, training and measuring.

What the engine does with predicted prompts, here in plain steps and without a scheduler.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.kv.provenance import Span
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.decoder import Decoder
from edgekv.predict.features import Recorder
from edgekv.predict.look import ROWS_AGAIN, Glance, chosen
from edgekv.predict.predictor import Predictor


class ArrayView:
    """KV of one sequence in plain arrays, written at `offset`. Differentiable."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self.arrays: dict[int, tuple[mx.array, mx.array]] = {}
        self.states: dict[int, tuple[mx.array, ...]] = {}

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

    def state(self, layer: int) -> tuple[mx.array, ...] | None:
        """A recurrent layer's state, behind all that was put in."""
        return self.states.get(layer)

    def stops(self, num_rows: int) -> list[int]:
        """No snapshots are kept."""
        return [num_rows]

    def set_state(self, layer: int, _num_rows: int, state: tuple[mx.array, ...]) -> None:
        """Put the state behind this pass."""
        self.states[layer] = state

    def at(self, offset: int) -> "ArrayView":
        """Another place in the same sequence; what either writes both read."""
        other = ArrayView(offset)
        other.arrays, other.states = self.arrays, self.states
        return other

    def copy(self, offset: int) -> "ArrayView":
        """A view of the same arrays, which goes its own way from `offset` on."""
        other = ArrayView(offset)
        other.arrays, other.states = dict(self.arrays), dict(self.states)
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


def run_next(decoder: Decoder, tokens: np.ndarray, views: Sequence[ArrayView]) -> mx.array:
    """The next token of each of several texts, in one pass → `(N, hidden)`."""
    batch = PackedBatch([Segment(view, 1) for view in views])
    hidden = decoder.run_layers(decoder.embed(mx.array(tokens, dtype=mx.uint32)), batch)
    for view in views:
        view.offset += 1
    return hidden


class Predicted(NamedTuple):
    """A text whose middle is predicted.

    Attributes:
        view: Its KV.
        rows: Its last ones, `(window, hidden)` after all layers.
        weights: Where the very last looks, `(T,)`; see `look.Glance`.
        hidden: All rows as they enter the first predicted layer, `(T, hidden)`.
    """

    view: ArrayView
    rows: mx.array
    weights: np.ndarray
    hidden: mx.array


def predicted_context(
    base: Decoder,
    aux: Decoder,
    predictor: Predictor,
    token_ids: list[int],
    *,
    sinks: int,
    window: int,
    look: float = 0.0,
) -> Predicted:
    """KV of a text whose middle is predicted, and its last rows.

    Its first `sinks` tokens are computed exactly, its last `window`, at least one, by the base over
    what was predicted. `aux` is what the predictor looks at; `base` itself for kind "self". With
    `look` that part of what was predicted is computed, see `predict.look`.
    """
    end = len(token_ids) - window
    assert 0 <= sinks <= end < len(token_ids)
    recorder, view, lower = Recorder(predictor.places), ArrayView(), ArrayView()
    if sinks:
        run(base, token_ids[:sinks], view)
    seen = token_ids if predictor.kind == "self" else token_ids[:end]
    hidden = run(aux, seen, lower, last_layer=predictor.depth, taps=recorder)
    if sinks < end:
        trail = predictor.trail()
        predictor.predict(base, recorder.seen, (0, end), sinks, trail, view.at(sinks))
    if predictor.kind == "aux":
        hidden = base.embed(mx.array(token_ids, dtype=mx.uint32))
    else:
        view.arrays |= lower.arrays
    glance = Glance(window - 1)
    rows = _run_rows(base, predictor, view, hidden, [(end, len(token_ids))], glance)
    weights = np.array(glance.weights(base, view.at(len(token_ids) - 1)))[0]
    view.offset = len(token_ids)
    text = Predicted(view, rows, weights, hidden)
    if look and end > sinks:
        text = look_twice(base, predictor, text, chosen(weights, (sinks, end), look))
    return text


def look_twice(
    base: Decoder, predictor: Predictor, text: Predicted, spans: Sequence[Span]
) -> Predicted:
    """With the KV of such tokens computed after all, and the text's last rows again over that."""
    num_tokens, num_again = len(text.hidden), min(len(text.rows), ROWS_AGAIN)
    spans = [*spans, (num_tokens - num_again, num_tokens)]
    again = _run_rows(base, predictor, text.view, text.hidden, spans, None)[-num_again:]
    return text._replace(rows=mx.concatenate([text.rows[:-num_again], again]))


def _run_rows(
    base: Decoder,
    predictor: Predictor,
    view: ArrayView,
    hidden: mx.array,
    spans: Sequence[tuple[int, int]],
    taps: Taps | None,
) -> mx.array:
    """Rows of a text, `(T, hidden)` as they enter the first predicted layer, through the rest."""
    segments = [Segment(view.at(start), end - start) for start, end in spans]
    rows = mx.concatenate([hidden[start:end] for start, end in spans])
    first = predictor.first_layer
    return base.run_layers(rows, PackedBatch(segments), first_layer=first, taps=taps)
