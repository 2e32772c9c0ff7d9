"""What a predictor looks at: taps into the layers that run, of a token and of those before it.

    hidden states   RMS-normalised, without a weight: what every later layer begins with
    raw             the same as they are: what thin layers go on with
    keys, values    before k-norm and RoPE, so that a prediction does not depend on the position

The tokens before (lags) are what decides long-range recall: a deep layer's keys are about what came
before a token, and a map of the token alone cannot know it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import mlx.core as mx

from edgekv.models.config import DecoderConfig
from edgekv.models.decoder import Decoder

TapKind = Literal["hidden", "key", "value", "raw"]
Place = tuple[TapKind, int]  # which activation

_EPS = 1e-5


def place_width(place: Place, config: DecoderConfig) -> int:
    """Numbers of one row of an activation; heads side by side."""
    kind, index = place
    if kind == "hidden":
        return config.hidden_size
    return config.layers[index].num_kv_heads * config.layers[index].head_dim


class Tap(NamedTuple):
    """One activation of the token `lag` places back."""

    kind: TapKind  # which activation
    layer: int  # whose keys or values, or which layer hidden states enter
    lag: int = 0  # 0 is the token itself

    @property
    def place(self) -> Place:
        """The activation, whatever the lag."""
        return (self.kind, self.layer)


class Recorder:
    """Keeps those activations of a pass that taps want, `(N, width)` each, by place. A `Taps`.

    Of a decoder that is a part of one, the heads of all ranks.
    """

    def __init__(self, places: Iterable[Place], decoder: Decoder | None = None) -> None:
        """`decoder` makes the pass; None: a whole one."""
        self._places = frozenset(places)
        self._decoder = decoder
        self.seen: dict[Place, mx.array] = {}

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """`(N, hidden)` after `depth` layers."""
        if ("hidden", depth) in self._places:
            self.seen["hidden", depth] = mx.fast.rms_norm(hidden, None, _EPS)
        if ("raw", depth) in self._places:
            self.seen["raw", depth] = hidden

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each, before norms and RoPE."""
        del queries
        if ("key", layer) in self._places:
            self.seen["key", layer] = self._side_by_side(layer, keys)
        if ("value", layer) in self._places:
            self.seen["value", layer] = self._side_by_side(layer, values)

    def _side_by_side(self, layer: int, heads: mx.array) -> mx.array:
        """`(N, heads, head_dim)` of this rank → `(N, all heads · head_dim)`."""
        if self._decoder is not None and self._decoder.group.size > 1:
            num_heads = self._decoder.whole.layers[layer].num_kv_heads
            gathered = self._decoder.group.all_gather(mx.contiguous(heads.swapaxes(0, 1)))
            each = gathered.shape[0] // num_heads  # ranks that have the same one
            heads = gathered[::each].swapaxes(0, 1)
        return heads.reshape(heads.shape[0], -1)


@dataclass(frozen=True)
class Trail:
    """The last rows of a sequence at the places that lagged taps want."""

    num_rows: int  # as many are kept
    places: frozenset[Place]  # of these activations
    # `(num_rows, width)` each; fewer near the start of a sequence.
    rows: dict[Place, mx.array] = field(default_factory=dict)

    @classmethod
    def start(cls, taps: Iterable[Tap]) -> "Trail":
        """The trail before the first token: nothing, which counts as zeros."""
        lagged = [tap for tap in taps if tap.lag]
        return cls(max((t.lag for t in lagged), default=0), frozenset(t.place for t in lagged))

    def after(self, seen: dict[Place, mx.array], start: int, end: int) -> "Trail":
        """The trail behind the rows `[start, end)` of a pass."""
        rows = {}
        for place in self.places:
            chunk = seen[place][max(start, end - self.num_rows) : end]
            if place in self.rows and chunk.shape[0] < self.num_rows:
                chunk = mx.concatenate([self.rows[place], chunk])[-self.num_rows :]
            rows[place] = chunk * 1  # a copy: a view would keep all rows of the pass
        return replace(self, rows=rows)


def gather(
    taps: tuple[Tap, ...],
    seen: dict[Place, mx.array],
    span: tuple[int, int],
    skip: int,
    trail: Trail,
) -> mx.array:
    """Features of rows of one segment, `(rows - skip, F)`.

    Args:
        taps: Which, in this order.
        seen: Activations of the whole pass.
        span: The segment's rows in it, half-open.
        skip: Its first rows, whose features are not wanted.
        trail: Behind what came before the segment.
    """
    return mx.concatenate([_rows(seen[tap.place], *span, skip, tap, trail) for tap in taps], axis=1)


def _rows(array: mx.array, start: int, end: int, skip: int, tap: Tap, trail: Trail) -> mx.array:
    missing = tap.lag - skip  # rows before the segment
    if missing <= 0:
        return array[start - missing : end - tap.lag]
    before = trail.rows.get(tap.place, array[:0])[-missing:]
    zeros = mx.zeros((missing - before.shape[0], array.shape[1]), dtype=array.dtype)
    rows = mx.concatenate([zeros, before, array[start : max(start, end - tap.lag)]])
    return rows[: end - start - skip]
