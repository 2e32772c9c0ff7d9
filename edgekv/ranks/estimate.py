"""What several ranks cost and give a model, by arithmetic. Pure.

Ranks compute a step beside each other and wait for each other in collectives: two sums of the rows'
width a layer, one for the embedding, the logits, and what rank 0 tells.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS_BYTES = 4 << 10  # of rank 0's words to the others, a step


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What of a model decides how much its ranks tell each other."""

    name: str
    num_layers: int
    hidden_size: int
    vocab_size: int

    def messages(self, num_rows: int, item_bytes: int) -> list[int]:
        """Bytes of each collective of a step of so many rows, one row's logits asked for."""
        rows_bytes = num_rows * self.hidden_size * item_bytes
        return [rows_bytes] * (2 * self.num_layers + 1) + [self.vocab_size * item_bytes]


# Of the size that several machines are for; its configuration as published.
LARGE = Shape(name="gpt-oss-120b", num_layers=36, hidden_size=2880, vocab_size=201_088)


@dataclass(frozen=True)
class Cost:
    """Seconds of a collective by its bytes, measured at some sizes, in rising order."""

    points: Sequence[tuple[int, float]]

    def seconds(self, num_bytes: int) -> float:
        """Between two sizes along the line through them; beyond the last, along the last line."""
        sizes = [size for size, _ in self.points]
        if num_bytes <= sizes[0] or len(sizes) == 1:
            return self.points[0][1]
        right = min(bisect.bisect_left(sizes, num_bytes), len(sizes) - 1)
        (size_0, s_0), (size_1, s_1) = self.points[right - 1], self.points[right]
        return s_0 + (s_1 - s_0) * (num_bytes - size_0) / (size_1 - size_0)

    def waits_s(self, messages: Sequence[int]) -> float:
        """Seconds of a step in which ranks wait: all its collectives, one after the other."""
        return sum(map(self.seconds, [*messages, ORDERS_BYTES]))
