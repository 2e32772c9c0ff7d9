"""What runs together in one packed step: rows of several sessions, and what they share."""

from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from edgekv.models.attention import Segment
from edgekv.models.rope import Rope, RopeTables


@dataclass
class PackedBatch:
    """The segments of one step and what is computed once for all layers.

    Args:
        segments: In row order; N is the sum of their rows.
        tokens: `(N,)`, the rows' token ids; needed where layers are told of them
            (`DecoderConfig.per_layer`).
    """

    segments: list[Segment]
    tokens: mx.array | None = None
    positions: mx.array = field(init=False)  # (N,) int32
    per_layer: mx.array | None = field(init=False, default=None)  # (N, layers, size), if there are
    _tables: dict[Rope, RopeTables] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        positions: list[int] = []
        for segment in self.segments:
            positions.extend(range(segment.view.offset, segment.view.offset + segment.num_rows))
        self.positions = mx.array(positions, dtype=mx.int32)

    @property
    def num_rows(self) -> int:
        """Rows of all segments."""
        return sum(segment.num_rows for segment in self.segments)

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Append the rows' `(N, heads, dim)` keys and values to the segments' views.

        All of them before the first read: segments may share a session, and a reader of the arrays
        in between would make the next write copy them.
        """
        row = 0
        for segment in self.segments:
            rows = slice(row, row + segment.num_rows)
            segment.view.write(layer, keys[rows].swapaxes(0, 1), values[rows].swapaxes(0, 1))
            row += segment.num_rows

    def read(self, layer: int) -> list[tuple[mx.array, mx.array]]:
        """Each segment's keys and values, those of this step's rows included."""
        return [s.view.read(layer, s.view.offset + s.num_rows) for s in self.segments]

    def rotate(self, rope: Rope, heads: mx.array) -> mx.array:
        """Rotate `(N, heads, head_dim)` to the rows' positions."""
        if rope not in self._tables:
            self._tables[rope] = rope.tables(self.positions)
        return rope.apply(heads, self._tables[rope])


class Taps(Protocol):
    """Sees what the layers compute on their way; for KV Prediction."""

    def see_hidden(self, depth: int, hidden: mx.array) -> None:
        """`(N, hidden)`: what the first `depth` layers make of the rows."""
        ...

    def see_qkv(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        """`(N, heads, head_dim)` each; queries and keys before their norms and RoPE."""
        ...
