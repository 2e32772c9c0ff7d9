"""What is counted of requests, by app, and shown to Prometheus, `edgekv ps` and the page."""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from edgekv.chat.events import Event, Finished
from edgekv.errors import EdgeKVError
from edgekv.metrics import Stats, percentile
from edgekv.runtime import Runtime

_log = logging.getLogger(__name__)

RECENT_MAX = 200
_TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_TBT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass(frozen=True, kw_only=True)
class Recent:
    """One request that has ended; nothing of what it said."""

    app: str
    ended_s: float
    took_ms: float
    reason: str
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    ttft_ms: float | None = None
    tbt_ms: float | None = None


class Counting:
    """What came of one request so far."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self.ends: list[Finished] = []
        self._why = "cancelled"  # unless something else is said

    def saw(self, event: Event | None) -> None:
        """Something happened."""
        if isinstance(event, Finished):
            self.ends.append(event)
            self._why = event.reason

    def failed(self, error: EdgeKVError) -> None:
        """It did not end well."""
        self._why = type(error).__name__

    def recent(self, app: str) -> "Recent":
        """All of it."""
        known = Recent(
            app=app,
            ended_s=time.time(),
            took_ms=1e3 * (time.monotonic() - self._begun_s),
            reason=self._why,
        )
        if not self.ends:
            return known
        usage, stats = self.ends[0].usage, self.ends[0].stats
        return replace(
            known,
            num_prompt=usage.num_prompt,
            num_cached=usage.num_cached,
            num_output=sum(end.usage.num_output for end in self.ends),
            ttft_ms=stats.ttft_ms,
            tbt_ms=stats.tbt_p50_ms or None,
        )


class Metrics:
    """Counts of one daemon. Owned by the server's loop; `text` and `status` may run beside it."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by_app: dict[str, Any] = {"labelnames": ("app",), "registry": registry}
        self._requests = Counter(
            "edgekv_requests", "Requests that ended.", ("app", "reason"), registry=registry
        )
        self._running = Gauge("edgekv_requests_running", "Requests that run or wait.", **by_app)
        self._ttft = Histogram(
            "edgekv_ttft_seconds", "Time to the first token.", buckets=_TTFT_S, **by_app
        )
        self._tbt = Histogram(
            "edgekv_tbt_seconds",
            "Median gap of an answer's tokens.",
            buckets=_TBT_S,
            **by_app,
        )
        self._queue = Histogram(
            "edgekv_queue_seconds", "Submitted to the first step.", buckets=_TTFT_S, **by_app
        )
        self._tokens = Counter(
            "edgekv_tokens", "Tokens, by what they were.", ("app", "kind"), registry=registry
        )
        self._preemptions = Counter("edgekv_preemptions", "Requests that gave way.", **by_app)
        self._pool = Gauge("edgekv_pool_bytes", "KV memory.", ("kind",), registry=registry)
        self._disk = Gauge("edgekv_disk_bytes", "KV on disk.", ("kind",), registry=registry)
        self._swap = Gauge("edgekv_swap", "What moved so far.", ("what",), registry=registry)
        self._recent: deque[Recent] = deque(maxlen=RECENT_MAX)
        self._num_running: dict[str, int] = {}

    @contextmanager
    def request(self, app: str, request_id: str) -> Iterator["Counting"]:
        """While a request of an app is answered; its end is counted, and logged as one line."""
        counting = Counting()
        self._num_running[app] = self._num_running.get(app, 0) + 1
        self._running.labels(app).inc()
        try:
            yield counting
        finally:
            self._running.labels(app).dec()
            self._num_running[app] -= 1
            if not self._num_running[app]:
                del self._num_running[app]
            self._ended(app, request_id, counting)

    def _ended(self, app: str, request_id: str, counting: "Counting") -> None:
        recent = counting.recent(app)
        self._recent.append(recent)
        self._requests.labels(app, recent.reason).inc()
        for finished in counting.ends:
            self._count(app, finished.stats)
        figures = {n: v for n, v in asdict(recent).items() if n not in ("app", "ended_s", "reason")}
        shown = " ".join(f"{n}={v:.0f}" for n, v in figures.items() if v is not None)
        _log.info("request=%s app=%s end=%s %s", request_id, app, recent.reason, shown)

    def _count(self, app: str, stats: Stats) -> None:
        if stats.ttft_ms is not None:
            self._ttft.labels(app).observe(stats.ttft_ms / 1e3)
        if stats.tbt_p50_ms:
            self._tbt.labels(app).observe(stats.tbt_p50_ms / 1e3)
        self._queue.labels(app).observe(stats.queue_ms / 1e3)
        for kind, number in (
            ("prompt", stats.num_prompt_tokens),
            ("cached", stats.num_cached_tokens),
            ("restored", stats.num_restored_tokens),
            ("output", stats.num_output_tokens),
            ("predicted", stats.num_predicted_tokens),
            ("repaired", stats.num_repaired_tokens),
            ("retracted", stats.num_retracted_tokens),
        ):
            self._tokens.labels(app, kind).inc(number)
        self._preemptions.labels(app).inc(stats.num_preemptions)

    def text(self, runtime: Runtime | None) -> bytes:
        """For Prometheus."""
        if runtime is not None:
            for kind, number in _memory(runtime).items():
                self._pool.labels(kind).set(number)
            for kind, number in _disk(runtime).items():
                self._disk.labels(kind).set(number)
            for what, moved in asdict(runtime.counters().swap).items():
                if isinstance(moved, int | float):
                    self._swap.labels(what).set(moved)
        return generate_latest(self._registry)

    def status(self, runtime: Runtime | None, app: str | None) -> dict[str, Any]:
        """What is going on, for people; of one app, or of all."""
        recent = [one for one in self._recent if app is None or one.app == app]
        names = {one.app for one in recent} | {n for n in self._num_running if app in (None, n)}
        status: dict[str, Any] = {
            "apps": [self._app_status(name, recent) for name in sorted(names)],
            "recent": [asdict(one) for one in reversed(recent)],
        }
        if runtime is not None:
            status["pool"] = _memory(runtime)
            status["disk"] = _disk(runtime)
        return status

    def _app_status(self, name: str, recent: list[Recent]) -> dict[str, Any]:
        ours = [one for one in recent if one.app == name]
        ttfts = [one.ttft_ms for one in ours if one.ttft_ms is not None]
        tbts = [one.tbt_ms for one in ours if one.tbt_ms is not None]
        return {
            "name": name,
            "num_running": self._num_running.get(name, 0),
            "num_recent": len(ours),
            "ttft_p50_ms": percentile(ttfts, 50),
            "ttft_p95_ms": percentile(ttfts, 95),
            "tbt_p50_ms": percentile(tbts, 50),
            "num_prompt_tokens": sum(one.num_prompt for one in ours),
            "num_cached_tokens": sum(one.num_cached for one in ours),
        }


def _memory(runtime: Runtime) -> dict[str, int]:
    pool = runtime.pool_snapshot()
    return {
        "budget": pool.budget_bytes,
        "used": pool.used_bytes,
        "free": pool.free_bytes,
        "peak": pool.peak_bytes,
    }


def _disk(runtime: Runtime) -> dict[str, int]:
    snapshot = runtime.store_snapshot()
    if snapshot is None:
        return {}
    values = asdict(snapshot)
    return {name: value for name, value in values.items() if name.endswith("bytes")}
