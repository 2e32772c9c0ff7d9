"""How long a step takes, learned from the steps that ran.

A step costs a fixed part (reading the weights), a part per row (linear layers) and a part per
query-key pair (attention). Steps are remembered by shape, the last few of each, so that an hour of
decoding does not wash out what prefill costs; a step that was interrupted is outvoted by its peers.
"""

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import median

SAMPLES_PER_SHAPE = 5
_PAIRS_UNIT = 1000.0  # keeps the three features within a few orders of magnitude
_SWEEPS = 8  # of coordinate descent, each fit from where the last one ended
_DRIFT_RATE = 0.2
_DRIFT_RANGE = (0.5, 3.0)
_LATE = 0.05  # of steps may take longer than what is promised of them
_SPREAD_RATE = 0.04
_SPREAD_RANGE = (1.0, 1.3)
_BETWEEN_RATE_MS = 2.0
_BETWEEN_MAX = 0.25  # of a gap: steps must not shrink for what a busy disk does beside them

Vector = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What a step's cost depends on: its rows, and its query-key pairs."""

    num_rows: int
    num_pairs: int

    def plus(self, num_rows: int, offset: int, share: float = 1.0) -> "StepShape":
        """With `num_rows` more behind `offset` tokens, at a `share` of what a row usually costs."""
        num_pairs = num_rows * (offset + num_rows)
        if share != 1.0:
            num_rows, num_pairs = math.ceil(share * num_rows), math.ceil(share * num_pairs)
        return StepShape(num_rows=self.num_rows + num_rows, num_pairs=self.num_pairs + num_pairs)

    @property
    def features(self) -> Vector:
        """What the three coefficients multiply."""
        return (1.0, float(self.num_rows), self.num_pairs / _PAIRS_UNIT)

    @property
    def kind(self) -> tuple[int, int]:
        """Shapes within a factor of two share their samples."""
        return (self.num_rows.bit_length(), self.num_pairs.bit_length())


EMPTY_STEP = StepShape(num_rows=0, num_pairs=0)


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Milliseconds of a step: `drift * (fixed + per_row * rows + per_kilopair * pairs / 1000)`."""

    weights: Vector = (1.0, 1.0, 0.01)  # the three coefficients, none negative
    # How much slower (or faster) than that the last steps were: throttling, another process, a
    # battery show here before every shape has been seen again.
    drift: float = 1.0
    # 95th percentile of what steps took, relative to what they were expected to take.
    spread: float = 1.1
    # 95th percentile of what passes between two steps while somebody decodes: messages, KV that
    # moves, other threads of the process.
    between_ms: float = 0.0
    # by kind of shape, the last steps and their milliseconds
    samples: dict[tuple[int, int], tuple[tuple[StepShape, float], ...]] = field(
        default_factory=dict
    )

    def step_ms(self, shape: StepShape) -> float:
        """Expected milliseconds of a step."""
        return self.drift * self.undisturbed_ms(shape)

    def undisturbed_ms(self, shape: StepShape) -> float:
        """What steps like this usually take, whatever slows down those of this moment."""
        return _dot(self.weights, shape.features)

    @property
    def row_ms(self) -> float:
        """What one more row adds to a step, attention aside."""
        return self.drift * self.weights[1]

    def added_ms(self, shape: StepShape) -> float:
        """What segments of this shape add to a step."""
        _, rows, kilopairs = shape.features
        return self.drift * (self.weights[1] * rows + self.weights[2] * kilopairs)

    def may_take_ms(self, gap_ms: float) -> float:
        """What a step may be expected to take that is to end `gap_ms` after the one before."""
        return (gap_ms - min(self.between_ms, _BETWEEN_MAX * gap_ms)) / self.spread

    def observe_between(self, ms: float) -> "CostModel":
        """The model after `ms` passed between two steps while somebody decodes; as `spread`."""
        late = ms > self.between_ms
        moved_ms = self.between_ms + _BETWEEN_RATE_MS * (late - _LATE)
        return replace(self, between_ms=max(0.0, moved_ms))

    def observe(self, shape: StepShape, ms: float) -> "CostModel":
        """The model after a step of this shape took `ms`."""
        seen = (*self.samples.get(shape.kind, ()), (shape, ms))[-SAMPLES_PER_SHAPE:]
        samples = {**self.samples, shape.kind: seen}
        weights = _fit(self.weights, [_typical(steps) for steps in samples.values()])
        low, high = _DRIFT_RANGE
        ratio = max(low, min(high, ms / max(1e-6, _dot(weights, shape.features))))
        drift = self.drift + _DRIFT_RATE * (ratio - self.drift)
        spread = self._spread_after(shape, ms) if shape.kind in self.samples else self.spread
        return replace(self, weights=weights, drift=drift, spread=spread, samples=samples)

    def _spread_after(self, shape: StepShape, ms: float) -> float:
        """Up quickly if the step was late, down slowly if not: they balance at the percentile."""
        late = ms > self.spread * self.step_ms(shape)
        low, high = _SPREAD_RANGE
        return max(low, min(high, self.spread + _SPREAD_RATE * (late - _LATE)))

    def rows_within(
        self, budget_ms: float, shape_of: Callable[[int], StepShape], rows_max: int
    ) -> int:
        """Most rows with which a step, of the shape they give it, keeps within `budget_ms`."""
        rows = range(1, rows_max + 1)
        return bisect.bisect_right(rows, budget_ms, key=lambda n: self.step_ms(shape_of(n)))


def _dot(a: Vector, b: Vector) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _typical(steps: tuple[tuple[StepShape, float], ...]) -> tuple[Vector, float]:
    """Mean features and median time of steps alike."""
    features = [shape.features for shape, _ in steps]
    count = len(steps)
    mean = (1.0, sum(f[1] for f in features) / count, sum(f[2] for f in features) / count)
    return mean, median(ms for _, ms in steps)


def _fit(start: Vector, points: list[tuple[Vector, float]]) -> Vector:
    """Non-negative least squares of relative errors, by coordinate descent.

    `start` counts as a thousandth of a point, which decides what the points leave open.
    """
    gram = [[0.0] * 3 for _ in range(3)]
    target = [0.0] * 3
    for x, ms in points:
        weight = 1.0 / max(ms, 1e-3) ** 2
        for i in range(3):
            target[i] += weight * x[i] * ms
            for j in range(3):
                gram[i][j] += weight * x[i] * x[j]
    prior = [1e-3 * gram[i][i] + 1e-12 for i in range(3)]
    w = list(start)
    for _ in range(_SWEEPS):
        for i in range(3):
            others = sum(gram[i][j] * w[j] for j in range(3) if j != i)
            best = (target[i] + prior[i] * start[i] - others) / (gram[i][i] + prior[i])
            w[i] = max(0.0, best)
    return (w[0], w[1], w[2])
