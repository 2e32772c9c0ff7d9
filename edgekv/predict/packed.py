"""One packed step in which some sessions' KV is predicted or repaired.

    kind "self"          rows of exact, predicted and decoding segments
      layers [0, k)      ├─ run them all, keep hidden states ────────────┐
      predictor          ├─ KV of layers [k, L) for predicted rows       │ later:
      layers [k, L)      └─ run the rest over it: window, decode … ◀─────┴─ rows under repair

    kind "aux"           the auxiliary runs the predicted rows, the base all others

Rows under repair are computed like any others, over KV in front of them that is exact by then, and
overwrite what was predicted for them.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from edgekv.kv.provenance import Span
from edgekv.kv.view import StagedView
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.decoder import Decoder
from edgekv.predict.features import Recorder
from edgekv.predict.look import Glance
from edgekv.predict.predictor import Predictor
from edgekv.predict.state import Prediction, StagedState
from edgekv.predict.thin import Rows, run_thin


@dataclass(frozen=True, kw_only=True)
class Part:
    """One session's rows in a step."""

    view: StagedView  # its KV, at the first row
    num_rows: int  # rows
    state: StagedState | None = None  # of a session with predicted KV
    predicted: Span = (0, 0)  # which of the rows are predicted
    repair: bool = False  # the rows' hidden states are kept; of kind "aux" they are as any others
    aux_start: int = 0  # of kind "aux": where the auxiliary goes on
    # What it has to run from there, up to the last predicted row if there is one.
    aux_tokens: Sequence[int] = ()
    glance: bool = False  # where its last row looks is wanted

    @property
    def start(self) -> int:
        """Position of the first row."""
        return self.view.offset

    def segment_of(self, span: Span) -> Segment:
        """Some of its rows."""
        return Segment(self.view.at(self.start + span[0]), span[1] - span[0])

    @property
    def exact_spans(self) -> list[Span]:
        """Rows that run through all layers."""
        first, last = self.predicted
        spans = ((0, first), (last, self.num_rows)) if first < last else ((0, self.num_rows),)
        return [span for span in spans if span[0] < span[1]]


class Packed(NamedTuple):
    """What came of a step.

    Attributes:
        hidden: After all layers, of the rows that ran through them; None for none.
        spans: Of every part, which rows of these are its own.
        glances: By part that wanted to know: how much its last row looks at each token, `(T,)`.
    """

    hidden: mx.array | None
    spans: list[Span]
    glances: dict[int, mx.array]


def run_packed(
    base: Decoder, prediction: Prediction, tokens: mx.array, parts: Sequence[Part]
) -> Packed:
    """Run a step.

    Args:
        base: The model.
        prediction: How KV is predicted.
        tokens: `(N,)`, of all parts in order; of kind "self" without those under repair, whose
            hidden states are kept.
        parts: Rows of every session, those under repair last; a session may have several parts.
    """
    if prediction.predictor.kind == "self":
        return _run_self(base, prediction, tokens, parts)
    for part in parts:
        if part.aux_tokens:
            _run_auxiliary(base, prediction, part)
    return _finish(base, parts, _by_part(base.embed(tokens), parts), 0, prediction.predictor)


def _run_self(
    base: Decoder, prediction: Prediction, tokens: mx.array, parts: Sequence[Part]
) -> Packed:
    depth = prediction.predictor.depth
    lower = [part for part in parts if not part.repair]
    recorder = Recorder(prediction.predictor.places, base)
    rows: list[mx.array] = []
    if lower:
        batch = PackedBatch([Segment(part.view, part.num_rows) for part in lower])
        hidden = base.run_layers(base.embed(tokens), batch, last_layer=depth, taps=recorder)
        rows = _by_part(hidden, lower)
    at = 0
    for part, hidden in zip(lower, rows, strict=True):
        if part.state is not None:
            part.state.keep(part.start, hidden)
            _predict(base, prediction, recorder, part, (at, at + part.predicted[1]))
            part.state.trail = part.state.trail.after(recorder.seen, at, at + part.num_rows)
        at += part.num_rows
    thin = [
        Rows(hidden[slice(*part.predicted)], [part.segment_of(part.predicted)])
        for part, hidden in zip(lower, rows, strict=True)
        if prediction.predictor.thin and part.predicted[0] < part.predicted[1]
    ]
    for part in parts[len(lower) :]:  # after all that is kept of this step
        assert part.repair
        assert part.state is not None
        rows.append(part.state.kept(part.start, part.start + part.num_rows))
    return _finish(base, parts, rows, depth, prediction.predictor, thin)


def _run_auxiliary(base: Decoder, prediction: Prediction, part: Part) -> None:
    """The auxiliary goes on from where it was."""
    assert part.state is not None
    num_rows = len(part.aux_tokens)
    aux = prediction.aux
    recorder = Recorder(prediction.predictor.places, aux)
    aux.run_layers(
        aux.embed(mx.array(list(part.aux_tokens), dtype=mx.uint32)),
        PackedBatch([Segment(part.state.view.at(part.aux_start), num_rows)]),
        last_layer=prediction.predictor.depth,
        taps=recorder,
    )
    _predict(base, prediction, recorder, part, (0, num_rows))
    part.state.trail = part.state.trail.after(recorder.seen, 0, num_rows)


def _predict(
    base: Decoder, prediction: Prediction, recorder: Recorder, part: Part, upto: Span
) -> None:
    """Write predicted KV for a part, whose last predicted row is the last of the recorded span.

    Thin layers do that beside the rows that run through all others.
    """
    first, last = part.predicted
    if first == last or prediction.predictor.thin:
        return
    assert part.state is not None
    view, trail = part.view.at(part.start + first), part.state.trail
    skip = upto[1] - upto[0] - (last - first)
    prediction.predictor.predict(base, recorder.seen, upto, skip, trail, view)


def _finish(
    base: Decoder,
    parts: Sequence[Part],
    rows: list[mx.array],
    first_layer: int,
    predictor: Predictor,
    thin: Sequence[Rows] = (),
) -> Packed:
    """Run the rows that are not predicted through the other layers, others through thin ones."""
    segments, exact, spans = [], [], []
    at = 0
    for part, entering in zip(parts, rows, strict=True):
        start = at
        for first, last in part.exact_spans:
            segments.append(part.segment_of((first, last)))
            exact.append(entering[first:last])
            at += last - first
        spans.append((start, at))
    predicted = (
        Rows(mx.concatenate([each.hidden for each in thin]), [each.segments[0] for each in thin])
        if thin
        else None
    )
    if not segments:
        if predicted is not None:
            run_thin(base, predictor.thin, first_layer, None, predicted)
        return Packed(None, spans, {})
    looks = {i: Glance(spans[i][1] - 1) for i, part in enumerate(parts) if part.glance}
    hidden = exact[0] if len(exact) == 1 else mx.concatenate(exact)
    taps = _Each(looks.values())
    if predicted is None:
        hidden = base.run_layers(hidden, PackedBatch(segments), first_layer=first_layer, taps=taps)
    else:
        found = run_thin(base, predictor.thin, first_layer, Rows(hidden, segments), predicted, taps)
        assert found is not None
        hidden = found
    last_rows = {i: parts[i].view.at(parts[i].start + parts[i].num_rows - 1) for i in looks}
    glances = {i: look.weights(base, last_rows[i])[0] for i, look in looks.items()}
    return Packed(hidden, spans, glances)


class _Each:
    """Several `Taps` of one pass."""

    def __init__(self, taps: Iterable[Taps]) -> None:
        self._taps = tuple(taps)

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        for tap in self._taps:
            tap.see_hidden(depth, hidden)

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        for tap in self._taps:
            tap.see_qkv(layer, queries, keys, values)


def _by_part(array: mx.array, parts: Sequence[Part]) -> list[mx.array]:
    ends = itertools.accumulate(part.num_rows for part in parts)
    return [array[end - part.num_rows : end] for part, end in zip(parts, ends, strict=True)]
