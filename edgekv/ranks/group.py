"""What the ranks of a model tell each other while they compute: MLX's collectives, in one order.

Each rank builds the graph of the same step with its own part of the weights. MLX runs what is
independent in an order of its own, and ranks that met in different collectives would wait for ever:
so each collective of a step depends on the one before it, whatever the graph looks like.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

Collective = Callable[..., mx.array]


class Group:
    """The ranks of one model. Owned by the engine thread.

    Attributes:
        rank: Number of this process; 0 plans, samples and owns the sessions.
        size: How many there are.
        raw: MLX's; None for a rank that is alone.
    """

    def __init__(self, raw: mx.distributed.Group | None) -> None:
        self.raw = raw
        self.rank = raw.rank() if raw is not None else 0
        self.size = raw.size() if raw is not None else 1
        self._last: mx.array | None = None

    def begin(self) -> None:
        """A graph begins: what was built before may never run."""
        self._last = None

    def all_sum(self, x: mx.array) -> mx.array:
        """The sum of all ranks' arrays, which have one shape."""
        return self._in_order(mx.distributed.all_sum, x)

    def all_max(self, x: mx.array) -> mx.array:
        """The largest of all ranks' numbers, place by place."""
        return self._in_order(mx.distributed.all_max, x)

    def all_gather(self, x: mx.array) -> mx.array:
        """`(n, …)` of each rank → `(size · n, …)`, in the order of ranks."""
        return self._in_order(mx.distributed.all_gather, x)

    def _in_order(self, collective: Collective, x: mx.array) -> mx.array:
        if self.raw is None:
            return x
        if self._last is not None:
            x = mx.depends([x], [self._last])[0]
        self._last = collective(x, group=self.raw)
        return self._last

    def exchange(self, words: np.ndarray) -> np.ndarray:
        """The sum of all ranks' int32 words, at once: no step runs, and all ranks call it.

        Raises:
            RuntimeError: A rank is gone.
        """
        if self.raw is None:
            return words
        total = mx.distributed.all_sum(mx.array(words), group=self.raw)
        mx.eval(total)  # raises; `np.array` alone would return what has come so far
        return np.array(total)


ALONE = Group(None)
