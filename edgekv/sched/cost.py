"""How long a step takes, learned from the steps that ran.

A step costs a fixed part (reading the weights), a part per row (linear layers) and a part per
query-key pair (attention). The three are found by recursive least squares with forgetting, so the
estimate follows the machine: throttling, another process, a battery.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

FORGETTING = 0.97  # half the weight is on the last 23 steps
COVARIANCE_MAX = 1e4
_PAIRS_UNIT = 1000.0  # keeps the three features within a few orders of magnitude

Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]


def _vector(component: Callable[[int], float]) -> Vector:
    return (component(0), component(1), component(2))


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step's cost depends on: its rows, and its query-key pairs."""

    num_rows: int
    num_pairs: int

    def plus(self, num_rows: int, offset: int) -> "StepShape":
        """With one more segment, of `num_rows` rows behind `offset` tokens."""
        return StepShape(
            num_rows=self.num_rows + num_rows,
            num_pairs=self.num_pairs + num_rows * (offset + num_rows),
        )


EMPTY_STEP = StepShape(num_rows=0, num_pairs=0)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Milliseconds of a step: `fixed + per_row * rows + per_kilopair * pairs / 1000`.

    Attributes:
        weights: The three coefficients; a negative estimate counts as 0.
        covariance: Of the recursive least squares.
    """

    weights: Vector = (1.0, 1.0, 0.01)
    covariance: Matrix = ((1e4, 0.0, 0.0), (0.0, 1e2, 0.0), (0.0, 0.0, 1.0))

    def predict_ms(self, shape: StepShape) -> float:
        """Expected milliseconds of a step."""
        fixed, per_row, per_kilopair = (max(w, 0.0) for w in self.weights)
        return fixed + per_row * shape.num_rows + per_kilopair * shape.num_pairs / _PAIRS_UNIT

    def observe(self, shape: StepShape, ms: float) -> "CostModel":
        """The model after a step of this shape took `ms`.

        A step that was interrupted (the machine slept, a page fault storm) says nothing about the
        next: it counts as at most three times what was expected, once there is an expectation.
        """
        x: Vector = (1.0, float(shape.num_rows), shape.num_pairs / _PAIRS_UNIT)
        trace = sum(self.covariance[i][i] for i in range(3))
        if trace < 1e4:
            ms = min(ms, 3.0 * self.predict_ms(shape) + 1.0)
        px = _vector(lambda i: sum(self.covariance[i][j] * x[j] for j in range(3)))
        scale = FORGETTING + sum(x[i] * px[i] for i in range(3))
        error = ms - sum(w * v for w, v in zip(self.weights, x, strict=True))

        def covariance(i: int, j: int) -> float:
            value = (self.covariance[i][j] - px[i] * px[j] / scale) / FORGETTING
            # With steps all alike the forgetting would let it grow without end.
            return max(-COVARIANCE_MAX, min(COVARIANCE_MAX, value))

        return replace(
            self,
            weights=_vector(lambda i: self.weights[i] + px[i] * error / scale),
            covariance=(
                _vector(lambda j: covariance(0, j)),
                _vector(lambda j: covariance(1, j)),
                _vector(lambda j: covariance(2, j)),
            ),
        )

    def rows_within(self, budget_ms: float, base: StepShape, *, offset: int, rows_max: int) -> int:
        """Most rows behind `offset` tokens that keep a step with `base` within `budget_ms`."""
        low, high = 0, rows_max
        while low < high:
            middle = (low + high + 1) // 2
            if self.predict_ms(base.plus(middle, offset)) <= budget_ms:
                low = middle
            else:
                high = middle - 1
        return low
