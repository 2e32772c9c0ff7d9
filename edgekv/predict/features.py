"""What a predictor looks at: taps into the layers that run, of a token and of those before it.

    hidden states   RMS-normalised, without a weight: what every later layer begins with
    keys, values    before k-norm and RoPE, so that a prediction does not depend on the position

The tokens before (lags) are what decides long-range recall: a deep layer's keys are about what came
before a token, and a map of the token alone cannot know it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from edgekv.models.config import DecoderConfig
from edgekv.models.decoder import Taps

TapKind = Literal["hidden", "key", "value"]
Place = tuple[TapKind, int]  # which activation


def place_width(place: Place, config: DecoderConfig) -> int:
    """Numbers of one row of an activation; heads side by side."""
    kind, index = place
    if kind == "hidden":
        return config.hidden_size
    return config.layers[index].num_kv_heads * config.layers[index].head_dim


_EPS = 1e-5


@dataclass(frozen=True, order=True)
class Tap:
    """One activation of the token `lag` places back.

    Attributes:
        kind: Which activation.
        index: Of "hidden": after how many layers. Else: of which layer.
        lag: 0 is the token itself.
    """

    kind: TapKind
    index: int
    lag: int = 0

    @property
    def place(self) -> Place:
        """The activation, whatever the lag."""
        return (self.kind, self.index)


class Recorder:
    """Keeps those activations of a pass that taps want, `(N, width)` each, by place."""

    def __init__(self, places: frozenset[Place]) -> None:
        self._places = places
        self.seen: dict[Place, mx.array] = {}

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """`(N, hidden)` after `depth` layers."""
        if ("hidden", depth) in self._places:
            self.seen["hidden", depth] = mx.fast.rms_norm(hidden, None, _EPS)

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each, before norms and RoPE."""
        del queries
        if ("key", layer) in self._places:
            self.seen["key", layer] = keys.reshape(keys.shape[0], -1)
        if ("value", layer) in self._places:
            self.seen["value", layer] = values.reshape(values.shape[0], -1)


@dataclass(frozen=True)
class Both:
    """Shows two what one would see."""

    first: Taps
    second: Taps

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """Show both what `Taps.see_hidden` sees."""
        self.first.see_hidden(depth, hidden)
        self.second.see_hidden(depth, hidden)

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """Show both what `Taps.see_qkv` sees."""
        self.first.see_qkv(layer, queries, keys, values)
        self.second.see_qkv(layer, queries, keys, values)


class Trail:
    """The last rows of a sequence at the places that lagged taps want. A value: never changed."""

    def __init__(
        self, rows: dict[Place, mx.array], num_rows: int, places: frozenset[Place]
    ) -> None:
        self.rows = rows  # (num_rows, width) each; fewer near the start of a sequence
        self.num_rows = num_rows
        self.places = places

    @classmethod
    def start(cls, taps: Iterable[Tap]) -> "Trail":
        """The trail before the first token: nothing, which counts as zeros."""
        lagged = [tap for tap in taps if tap.lag]
        places = frozenset(tap.place for tap in lagged)
        return cls({}, max((tap.lag for tap in lagged), default=0), places)

    def after(self, seen: dict[Place, mx.array], start: int, end: int) -> "Trail":
        """The trail behind the rows `[start, end)` of a pass."""
        rows = {}
        for place in self.places:
            chunk = seen[place][max(start, end - self.num_rows) : end]
            if place in self.rows and chunk.shape[0] < self.num_rows:
                chunk = mx.concatenate([self.rows[place], chunk])[-self.num_rows :]
            rows[place] = chunk * 1  # a copy: a view would keep all rows of the pass
        return Trail(rows, self.num_rows, self.places)

    @property
    def arrays(self) -> list[mx.array]:
        """All rows, to evaluate with the step that made them."""
        return list(self.rows.values())


def gather(
    taps: tuple[Tap, ...],
    seen: dict[Place, mx.array],
    span: tuple[int, int],
    skip: int,
    trail: Trail,
) -> mx.array:
    """Features of rows of one segment.

    Args:
        taps: Which, in this order.
        seen: Activations of the whole pass.
        span: The segment's rows in it, half-open.
        skip: Its first rows, whose features are not wanted.
        trail: Behind what came before the segment.

    Returns:
        `(rows - skip, F)`.
    """
    start, end = span
    return mx.concatenate(
        [_rows(seen[tap.place], start, end, skip, tap, trail) for tap in taps], axis=-1
    )


def _rows(array: mx.array, start: int, end: int, skip: int, tap: Tap, trail: Trail) -> mx.array:
    first = start + skip - tap.lag
    if first >= start:
        return array[first : end - tap.lag]
    before = trail.rows.get(tap.place)
    missing = start - first
    width = array.shape[1]
    parts = [] if before is None else [before[max(0, before.shape[0] - missing) :]]
    known = sum(part.shape[0] for part in parts)
    if known < missing:
        parts.insert(0, mx.zeros((missing - known, width), dtype=array.dtype))
    rows = mx.concatenate([*parts, array[start : max(start, end - tap.lag)]])
    return rows[: end - start - skip]
