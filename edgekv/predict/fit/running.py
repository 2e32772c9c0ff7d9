"""Sums of products over rows of features and targets, kept on the device while text runs by."""

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from edgekv.predict.fit.solve import Sums
from edgekv.predict.predictor import Block


@dataclass
class RunningSums:
    """Of the rows of one block, which were shifted before (see `Shift`); f32. See `Sums`."""

    xx: mx.array
    xy: mx.array
    yy: mx.array

    @classmethod
    def empty(cls, num_features: int, num_targets: int) -> "RunningSums":
        """Of no rows."""
        return cls(
            mx.zeros((num_features + 1, num_features + 1)),
            mx.zeros((num_features + 1, num_targets)),
            mx.zeros((num_targets,)),
        )

    def add(self, x: mx.array, y: mx.array) -> None:
        """More rows: `x (N, F)`, `y (N, out)`."""
        x, y = x.astype(mx.float32), y.astype(mx.float32)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=1)
        self.xx = self.xx + x.T @ x
        self.xy = self.xy + x.T @ y
        self.yy = self.yy + mx.sum(y * y, axis=0)
        mx.eval(self.xx, self.xy, self.yy)

    def to_host(self) -> Sums:
        """The same in f64, to solve."""
        return Sums(
            xx=np.array(self.xx, dtype=np.float64),
            xy=np.array(self.xy, dtype=np.float64),
            yy=np.array(self.yy, dtype=np.float64),
        )


@dataclass(frozen=True)
class Shift:
    """What rows of one block are taken less by: means of the first piece.

    Sums of squares in f32 lose the spread of numbers whose mean is a hundred times as large.
    """

    x: mx.array  # (F,)
    y: mx.array  # (out,)

    @classmethod
    def of(cls, x: mx.array, y: mx.array) -> "Shift":
        """Of the first rows, `x (N, F)` and `y (N, out)`."""
        means = [mx.mean(array.astype(mx.float32), axis=0) for array in (x, y)]
        mx.eval(means)
        return cls(*means)


def shifted(block: Block, shift: Shift) -> Block:
    """The same map of rows that were not shifted."""
    less = replace(block, bias=mx.zeros_like(block.bias))(shift.x[None])[0]
    return replace(block, bias=block.bias + shift.y - less)
