"""Which tokens' KV is exact, and what it is else: half-open ranges over one session.

"predicted" is what a predictor said, "computed" what the model made of that: rows that ran through
all layers, over KV in front of them that was not exact.
"""

import itertools
from collections.abc import Iterable
from typing import Literal

Provenance = Literal["exact", "computed", "predicted"]
Span = tuple[int, int]  # tokens, half-open


class ProvenanceMap:
    """Ranges `[start, end)` without gaps from 0, neighbours unlike. Owned by its SessionKV."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int, Provenance]] = []

    @property
    def num_tokens(self) -> int:
        """End of the last range."""
        return self._ranges[-1][1] if self._ranges else 0

    @property
    def ranges(self) -> tuple[tuple[int, int, Provenance], ...]:
        """All ranges in order."""
        return tuple(self._ranges)

    def spans(self, kind: Provenance, start: int = 0) -> list[Span]:
        """Tokens of a kind, from the `start`-th on."""
        found = [(max(start, low), high) for low, high, other in self._ranges if other == kind]
        return [span for span in found if span[0] < span[1]]

    @property
    def exact_prefix(self) -> int:
        """Tokens from 0 that are exact: only these may be shared or persisted."""
        if not self._ranges or self._ranges[0][2] != "exact":
            return 0
        return self._ranges[0][1]

    def mark(self, start: int, end: int, kind: Provenance) -> None:
        """Say where the KV of `[start, end)` came from; it may overwrite or append, not skip."""
        assert 0 <= start <= end
        assert start <= self.num_tokens, "a gap would have no provenance"
        if start == end:
            return
        pieces = [*self._cut(0, start), (start, end, kind), *self._cut(end, self.num_tokens)]
        self._ranges = []
        for low, high, kind in pieces:
            if self._ranges and self._ranges[-1][2] == kind:
                low = self._ranges.pop()[0]
            self._ranges.append((low, high, kind))

    def truncate(self, num_tokens: int) -> None:
        """Forget everything from `num_tokens` on."""
        self._ranges = self._cut(0, num_tokens)

    def _cut(self, low: int, high: int) -> list[tuple[int, int, Provenance]]:
        return [
            (max(start, low), min(end, high), kind)
            for start, end, kind in self._ranges
            if max(start, low) < min(end, high)
        ]


def common(some: Iterable[Span], others: Iterable[Span]) -> list[Span]:
    """Tokens that are in spans and in other ones, neither of which overlap among themselves."""
    both = ((max(a, c), min(b, d)) for (a, b), (c, d) in itertools.product(some, others))
    return [span for span in both if span[0] < span[1]]
