"""Closed-form fits: ridge regression and reduced rank from sums of products. NumPy alone.

Sums are over rows x of features, with a 1 at the end for the bias, and rows y of targets. All of a
fit's data is in them, so that any ridge and any rank costs no second pass over the text.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the features' own variance
_TINY = 1e-12
_SPARE = 64  # vectors more than wanted, and so many iterations: the error is that of a full one
_ITERATIONS = 8


@dataclass(kw_only=True)
class Sums:
    """Sums over rows: `xx (F + 1, F + 1)`, `xy (F + 1, out)` and `yy (out,)`, the squares alone."""

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows that were added."""
        return int(self.xx[-1, -1])

    def spread(self) -> np.ndarray:
        """Standard deviation of every target, `(out,)`."""
        mean = self.xy[-1] / self.num_rows
        variance: np.ndarray = np.maximum(self.yy / self.num_rows - mean**2, _TINY)
        spread: np.ndarray = np.sqrt(variance)
        return spread

    def squared_errors(self, weight: np.ndarray) -> np.ndarray:
        """Squared errors of `weight (F + 1, out)`, summed over these rows, `(out,)`."""
        fitted = np.einsum("fo,fo->o", weight, self.xx @ weight)
        errors: np.ndarray = self.yy - 2 * np.einsum("fo,fo->o", weight, self.xy) + fitted
        return errors


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A map and how good it is.

    Attributes:
        weight: `(F + 1, out)`, the bias below.
        ridges: Chosen for every group of targets.
        r2: Of every group on held-out rows.
    """

    weight: np.ndarray
    ridges: tuple[float, ...]
    r2: tuple[float, ...]


def fit_ridge(sums: Sums, held: Sums, groups: list[slice]) -> Fitted:
    """Least squares with the ridge that is best for each group of targets on held-out rows.

    Args:
        sums: Of the rows to fit.
        held: Of rows to choose by.
        groups: Columns that share a ridge: the targets of one layer.
    """
    num_rows = sums.num_rows
    mean_x, mean_y = sums.xx[-1, :-1] / num_rows, sums.xy[-1] / num_rows
    covariance = sums.xx[:-1, :-1] / num_rows - np.outer(mean_x, mean_x)
    cross = sums.xy[:-1] / num_rows - np.outer(mean_x, mean_y)
    variance = np.maximum(np.diag(covariance), _TINY)
    best: list[tuple[float, float, np.ndarray] | None] = [None] * len(groups)
    for ridge in RIDGES:
        slope = np.linalg.solve(covariance + np.diag(ridge * variance + _TINY), cross)
        weight = np.vstack([slope, mean_y - mean_x @ slope])
        errors = held.squared_errors(weight)
        for index, group in enumerate(groups):
            error = float(errors[group].sum())
            kept = best[index]
            if kept is None or error < kept[0]:
                best[index] = (error, ridge, weight[:, group].copy())
    chosen = [kept for kept in best if kept is not None]
    weight = np.hstack([kept[2] for kept in chosen])
    return Fitted(
        weight=weight,
        ridges=tuple(kept[1] for kept in chosen),
        r2=r2_by_group(held, weight, groups),
    )


def r2_by_group(held: Sums, weight: np.ndarray, groups: list[slice]) -> tuple[float, ...]:
    """Share of the targets' variance that a map explains on these rows, by group."""
    errors = held.squared_errors(weight)
    total = held.num_rows * held.spread() ** 2
    return tuple(float(1 - errors[group].sum() / total[group].sum()) for group in groups)


def reduce_rank(
    sums: Sums, weight: np.ndarray, rank: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`down (F, r)` and `up (r, out)` whose product is nearest to `weight` on these rows.

    Reduced-rank regression (Izenman 1975).

    Args:
        sums: Of the rows.
        weight: `(F + 1, out)`, the bias below.
        rank: r.
        importance: What an error of one unit in each target matters, `(out,)`.
    """
    importance = importance / importance.mean()  # f16 files: neither factor becomes tiny or huge
    scaled = weight[:-1] * importance
    mean_x = sums.xx[-1, :-1] / sums.num_rows
    covariance = sums.xx[:-1, :-1] / sums.num_rows - np.outer(mean_x, mean_x)
    leading = _leading(
        lambda rows: scaled.T @ (covariance @ (scaled @ rows)), len(importance), rank
    )
    return scaled @ leading, leading.T / importance


def _leading(multiply: Callable[[np.ndarray], np.ndarray], size: int, count: int) -> np.ndarray:
    """Leading eigenvectors `(size, count)` of a symmetric matrix that is known by its products.

    Subspace iteration from random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061): where the
    matrix is large a full decomposition takes minutes, and hardly anything of it is wanted.
    """
    width = count + _SPARE
    if size < 2 * width:
        _, vectors = np.linalg.eigh(multiply(np.eye(size)))
        return np.asarray(vectors[:, ::-1][:, :count])
    basis = np.random.default_rng(0).normal(size=(size, width))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(multiply(basis))
    _, vectors = np.linalg.eigh(basis.T @ multiply(basis))
    return np.asarray(basis @ vectors[:, ::-1][:, :count])
