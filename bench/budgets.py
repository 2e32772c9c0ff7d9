"""Peaks of memory and disk as fractions of their hard budgets."""

from edgekv.kv.layout import PoolSnapshot
from edgekv.store import StoreSnapshot


def budget_figures(pool: PoolSnapshot, store: StoreSnapshot | None) -> dict[str, float]:
    """Budgets and peak ratios of a run, for its row.

    Raises:
        AssertionError: A budget was exceeded, which is a bug of ours.
    """
    pool_peak = pool.peak_bytes / pool.budget_bytes
    disk_peak = store.peak_bytes / store.budget_bytes if store else 0.0
    assert pool_peak <= 1.0, "the pool exceeded its budget"
    assert disk_peak <= 1.0, "the stores exceeded their budget"
    return {
        "pool_bytes": pool.budget_bytes,
        "pool_peak_ratio": pool_peak,
        "disk_bytes": store.budget_bytes if store else 0,
        "disk_peak_ratio": disk_peak,
    }
