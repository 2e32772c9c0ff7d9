"""What runs are judged by: times, percentiles and ratios no finer than samples allow, peaks."""

import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from edgekv.kv.layout import PoolSnapshot
from edgekv.metrics import Stats, percentile
from edgekv.store import StoreSnapshot

# (key, percentile, samples needed): a P99 of fewer than 100 samples is a maximum by another name.
_PERCENTILES = (("p50", 50.0, 1), ("p95", 95.0, 20), ("p99", 99.0, 100), ("p999", 99.9, 10_000))
_RATIOS = tuple(f"{what}_ms_{p}" for what in ("ttft", "tbt") for p in ("p50", "p95", "p99"))
_CURVE_POINTS = 1000


class Stopwatch:
    """Milliseconds since it was made."""

    def __init__(self) -> None:
        self._start_s = time.perf_counter()

    def ms(self) -> float:
        """Milliseconds since it was made."""
        return 1e3 * (time.perf_counter() - self._start_s)


def ttft_ms(stats: Stats) -> float:
    """TTFT; for an answer without visible text (control tokens only) its first token's time."""
    return stats.queue_ms + stats.prefill_ms if stats.ttft_ms is None else stats.ttft_ms


def tail(name: str, samples: Sequence[float]) -> dict[str, float | None]:
    """`{name}_p50`, `_p95`, `_p99` and `_p999`; None where there are too few samples."""
    return {
        f"{name}_{key}": percentile(samples, q) if len(samples) >= needed else None
        for key, q, needed in _PERCENTILES
    }


def latency_ratio(over: Mapping[str, Any], under: Mapping[str, Any]) -> dict[str, float | None]:
    """TTFT and TBT percentiles of one row divided by those of another; None where unknown."""
    return {key: ratio(over.get(key), under.get(key)) for key in _RATIOS}


def ratio(over: float | None, under: float | None) -> float | None:
    """One to the other; None where one is unknown, or there is nothing to divide by."""
    return over / under if over is not None and under else None


def over_pairs(pairs: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Medians of each figure, of those pairs in which it is known."""
    known = {key: [v for pair in pairs if (v := pair[key]) is not None] for key in pairs[0]}
    return {key: median(values) if values else None for key, values in known.items()}


def curve(samples: Sequence[float]) -> list[float]:
    """The samples in order, or `_CURVE_POINTS` + 1 of their quantiles if they are more."""
    if len(samples) <= _CURVE_POINTS:
        return sorted(samples)
    ordered = sorted(samples)
    last = len(ordered) - 1
    return [ordered[round(i * last / _CURVE_POINTS)] for i in range(_CURVE_POINTS + 1)]


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
