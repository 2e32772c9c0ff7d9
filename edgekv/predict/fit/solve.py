"""Closed-form fits: ridge regression and reduced rank from sums of products. NumPy alone.

Sums are over rows x of features, with a 1 at the end for the bias, and rows y of targets. All of a
fit's data is in them, so that any ridge and any rank costs no second pass over the text.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the features' own variance
_TINY = 1e-12
_SPARE = 64  # vectors more than wanted, and so many iterations: the error is that of a full one
_ITERATIONS = 8


class Sums(NamedTuple):
    """Sums over rows: `xx (F + 1, F + 1)`, `xy (F + 1, out)` and `yy (out,)`, the squares alone."""

    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows that were added."""
        return int(self.xx[-1, -1])

    @property
    def mean_x(self) -> np.ndarray:
        """Of the features, `(F,)`."""
        return np.asarray(self.xx[-1, :-1] / self.num_rows)

    @property
    def mean_y(self) -> np.ndarray:
        """Of the targets, `(out,)`."""
        return np.asarray(self.xy[-1] / self.num_rows)

    def covariance(self) -> np.ndarray:
        """Of the features, `(F, F)`."""
        return np.asarray(self.xx[:-1, :-1] / self.num_rows - np.outer(self.mean_x, self.mean_x))

    def squared_errors(self, weight: np.ndarray) -> np.ndarray:
        """Squared errors of `weight (F + 1, out)`, summed over these rows, `(out,)`."""
        fitted = np.einsum("fo,fo->o", weight, self.xx @ weight)
        return np.asarray(self.yy - 2 * np.einsum("fo,fo->o", weight, self.xy) + fitted)


def fit_ridge(sums: Sums, held: Sums, groups: list[slice]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Least squares with the ridge that is best for each group of targets on held-out rows.

    Returns:
        The weight `(F + 1, out)`, the bias below, and the ridge of every group.
    """
    covariance = sums.covariance()
    cross = sums.xy[:-1] / sums.num_rows - np.outer(sums.mean_x, sums.mean_y)
    variance = np.maximum(np.diag(covariance), _TINY)
    weight, ridges = np.full_like(sums.xy, np.nan), [0.0] * len(groups)
    least = [np.inf] * len(groups)
    for ridge in RIDGES:
        slope = np.linalg.solve(covariance + np.diag(ridge * variance + _TINY), cross)
        tried = np.vstack([slope, sums.mean_y - sums.mean_x @ slope])
        errors = held.squared_errors(tried)
        for index, group in enumerate(groups):
            error = float(errors[group].sum())
            if error < least[index]:
                least[index], ridges[index] = error, ridge
                weight[:, group] = tried[:, group]
    return weight, tuple(ridges)


def r2_by_group(held: Sums, weight: np.ndarray, groups: list[slice]) -> tuple[float, ...]:
    """Share of the targets' variance that a map explains on these rows, by group."""
    errors = held.squared_errors(weight)
    total = np.maximum(held.yy - held.num_rows * held.mean_y**2, held.num_rows * _TINY)
    return tuple(float(1 - errors[group].sum() / total[group].sum()) for group in groups)


def reduce_rank(
    sums: Sums, weight: np.ndarray, rank: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`down (F, r)` and `up (r, out)` whose product is nearest to `weight` on these rows.

    Reduced-rank regression (Izenman 1975) of a `weight (F + 1, out)` with the bias below;
    `importance (out,)` is what an error of one unit in each target matters.
    """
    importance = importance / importance.mean()  # f16 files: neither factor becomes tiny or huge
    scaled, covariance = weight[:-1] * importance, sums.covariance()
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
