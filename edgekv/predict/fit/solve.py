"""Closed-form fits: ridge regression and reduced rank from sums of products. NumPy alone.

Sums are over rows x of features, with a 1 at the end for the bias, and rows y of targets. All of a
fit's data is in them, so that any ridge and any rank costs no second pass over the text. They may
be f32 and fill most of the memory: all is computed in f64, a panel of them at a time, and beside
them stands one matrix of their size.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # of the features' own variance
PANEL = 256  # rows
SPARE = 64  # vectors more than wanted, and so many iterations: the error is that of a full one
_ITERATIONS = 8
_TINY = 1e-12


def panels(size: int) -> Iterator[slice]:
    """Rows, a panel at a time."""
    for start in range(0, size, PANEL):
        yield slice(start, min(start + PANEL, size))


def _per_row(total: np.ndarray, num_rows: int) -> np.ndarray:
    return np.asarray(np.divide(total, num_rows, dtype=np.float64))


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
        return _per_row(self.xx[-1, :-1], self.num_rows)

    @property
    def mean_y(self) -> np.ndarray:
        """Of the targets, `(out,)`."""
        return _per_row(self.xy[-1], self.num_rows)

    def covariance(self) -> np.ndarray:
        """Of the features, `(F, F)`."""
        covariance = _per_row(self.xx[:-1, :-1], self.num_rows)
        for rows in panels(len(covariance)):
            covariance[rows] -= np.outer(self.mean_x[rows], self.mean_x)
        return covariance

    def cross(self, group: slice) -> np.ndarray:
        """Covariance of the features and some targets, `(F, group)`."""
        cross = _per_row(self.xy[:-1, group], self.num_rows)
        for rows in panels(len(cross)):
            cross[rows] -= np.outer(self.mean_x[rows], self.mean_y[group])
        return cross

    def squared_errors(self, weight: np.ndarray, group: slice) -> np.ndarray:
        """Squared errors of a `weight (F + 1, group)` of some targets, summed over these rows."""
        errors = self.yy[group].astype(np.float64)
        for rows in panels(len(self.xx)):
            fitted = self.xx[rows].astype(np.float64) @ weight - 2.0 * self.xy[rows, group]
            errors += np.einsum("fo,fo->o", weight[rows], fitted)
        return errors


def fit_ridge(
    sums: Sums,
    held: Sums,
    groups: list[slice],
    weight: np.ndarray | None = None,
    watch: Callable[[int], object] | None = None,
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Least squares with the ridge that is best for each group of targets on held-out rows.

    Args:
        sums: Rows to fit.
        held: Rows to choose by.
        groups: Columns of targets that share a ridge.
        weight: Where to write the weight.
        watch: Told how many groups are tried, each with every ridge.

    Returns:
        The weight `(F + 1, out)`, the bias below, and the ridge of every group.
    """
    weight = np.empty(sums.xy.shape) if weight is None else weight
    weight[:] = np.nan
    ridges, least = [0.0] * len(groups), [np.inf] * len(groups)
    for number, ridge in enumerate(RIDGES):
        factor = None  # freed before the next one is made
        factor = sums.covariance()
        variance = np.maximum(factor.diagonal(), _TINY)
        factor.flat[:: len(factor) + 1] += ridge * variance + _TINY
        if not cholesky_in_place(factor):
            continue  # so small a ridge is lost in the rounding of the sums
        for index, group in enumerate(groups):
            tried = np.empty((len(weight), group.stop - group.start))
            tried[:-1] = sums.cross(group)
            solve_in_place(factor, tried[:-1])
            tried[-1] = sums.mean_y[group] - sums.mean_x @ tried[:-1]
            error = float(held.squared_errors(tried, group).sum())
            if error < least[index]:
                least[index], ridges[index] = error, ridge
                weight[:, group] = tried
            if watch is not None:
                watch(number * len(groups) + index + 1)
    return weight, tuple(ridges)


def cholesky_in_place(matrix: np.ndarray) -> bool:
    """Put L of L Lᵀ = matrix, symmetric, into its lower triangle; False if it is not positive.

    By columns of panels, each from those on its left: NumPy's own takes two copies.
    """
    size = len(matrix)
    for panel in panels(size):
        left, below = matrix[panel, : panel.start], slice(panel.stop, size)
        corner = matrix[panel, panel] - left @ left.T
        try:
            corner = np.linalg.cholesky(corner)
        except np.linalg.LinAlgError:
            return False
        matrix[panel, panel] = corner
        rest = matrix[below, panel] - matrix[below, : panel.start] @ left.T
        matrix[below, panel] = np.linalg.solve(corner, rest.T).T
    return True


def solve_in_place(factor: np.ndarray, right: np.ndarray) -> None:
    """Put x of L Lᵀ x = right `(F, out)` in its place; L stands in the factor's lower triangle."""
    order = list(panels(len(factor)))
    for panel in order:
        right[panel] -= factor[panel, : panel.start] @ right[: panel.start]
        right[panel] = np.linalg.solve(factor[panel, panel], right[panel])
    for panel in reversed(order):
        right[panel] -= factor[panel.stop :, panel].T @ right[panel.stop :]
        right[panel] = np.linalg.solve(factor[panel, panel].T, right[panel])


def r2_by_group(held: Sums, weight: np.ndarray, groups: list[slice]) -> tuple[float, ...]:
    """Share of the targets' variance that a map explains on these rows, by group."""
    total = np.maximum(held.yy - held.num_rows * held.mean_y**2, held.num_rows * _TINY)
    return tuple(
        float(1 - held.squared_errors(weight[:, g].astype(np.float64), g).sum() / total[g].sum())
        for g in groups
    )


def is_smaller(rank: int, num_features: int, width: int) -> bool:
    """Whether a product of two matrices costs less than the one of full rank."""
    return rank * (num_features + width) < num_features * width


def reduce_rank(
    sums: Sums, weight: np.ndarray, rank: int, importance: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`down (F, r)` and `up (r, out)` whose product is nearest to `weight` on these rows.

    Reduced-rank regression (Izenman 1975) of a `weight (F + 1, out)` with the bias below;
    `importance (out,)` is what an error of one unit in each target matters.
    """
    importance = importance / importance.mean()  # f16 files: neither factor becomes tiny or huge
    covariance, slope = sums.covariance(), weight[:-1]

    def mapped(columns: np.ndarray) -> np.ndarray:
        scaled = (slope[rows] * importance for rows in panels(len(slope)))
        return np.concatenate([panel @ columns for panel in scaled])

    def multiply(columns: np.ndarray) -> np.ndarray:
        spread, product = covariance @ mapped(columns), np.zeros_like(columns)
        for rows in panels(len(slope)):
            product += (slope[rows] * importance).T @ spread[rows]
        return product

    leading = _leading(multiply, len(importance), rank)
    return mapped(leading), leading.T / importance


def _leading(multiply: Callable[[np.ndarray], np.ndarray], size: int, count: int) -> np.ndarray:
    """Leading eigenvectors `(size, count)` of a symmetric matrix that is known by its products.

    Subspace iteration from random vectors (Halko, Martinsson and Tropp, arXiv 0909.4061): where the
    matrix is large a full decomposition takes minutes, and hardly anything of it is wanted.
    """
    width = count + SPARE
    if size < 2 * width:
        _, vectors = np.linalg.eigh(multiply(np.eye(size)))
        return np.asarray(vectors[:, ::-1][:, :count])
    basis = np.random.default_rng(0).normal(size=(size, width))
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(multiply(basis))
    _, vectors = np.linalg.eigh(basis.T @ multiply(basis))
    return np.asarray(basis @ vectors[:, ::-1][:, :count])
