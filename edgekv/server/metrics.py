"""What is counted of requests, by app, and shown to Prometheus, `edgekv ps` and the page."""

import heapq
import logging
import threading
import time
from collections import Counter as Tally
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric

from edgekv.chat.events import Begun, Event, Finished
from edgekv.errors import EdgeKVError
from edgekv.metrics import AppUsage, Stats, percentile
from edgekv.runtime import Runtime
from edgekv.server.fields import Fault
from edgekv.server.live import APPS_MAX, Live

_log = logging.getLogger(__name__)

RECENT_MAX = 60  # requests of each app that are remembered
_SHOWN_MAX = 200  # of all apps together
_TTFT_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
_TBT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_COUNTED = {  # kinds of tokens: their fields of Stats
    "prompt": "num_prompt_tokens",
    "cached": "num_cached_tokens",
    "restored": "num_restored_tokens",
    "output": "num_output_tokens",
    "predicted": "num_predicted_tokens",
    "repaired": "num_repaired_tokens",
    "confirmed": "num_confirmed_tokens",
    "retracted": "num_retracted_tokens",
}


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
        self.begun_s = time.time()
        self.num_prompt = 0
        self.answers = False  # something of an answer has come
        self.ends: list[Finished] = []
        self._why = "cancelled"  # unless something else is said

    def saw(self, event: Event | None) -> None:
        """Something happened."""
        match event:
            case None:
                pass
            case Begun():
                self.num_prompt = event.num_prompt
            case Finished():
                self.ends.append(event)
                self._why = event.reason
            case _:
                self.answers = True

    def failed(self, error: EdgeKVError) -> None:
        """It did not end well."""
        self._why = type(error).__name__

    def recent(self, app: str) -> Recent:
        """All of it."""
        known = Recent(
            app=app,
            ended_s=time.time(),
            took_ms=1e3 * (time.monotonic() - self._begun_s),
            reason=self._why,
            num_prompt=self.num_prompt,
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


@dataclass(eq=False)
class _App:
    """What is known of one app's requests."""

    running: list[Counting] = field(default_factory=list)
    recent: deque[Recent] = field(default_factory=lambda: deque(maxlen=RECENT_MAX))
    reasons: Tally[str] = field(default_factory=Tally)  # of all that ended
    tokens: Tally[str] = field(default_factory=Tally)
    # Where it is counted for Prometheus.
    series: set[tuple[MetricWrapperBase, tuple[str, ...]]] = field(default_factory=set)

    def copy(self) -> "_App":
        """The same at this moment, for others to look at."""
        return _App(
            running=list(self.running),
            recent=self.recent.copy(),
            reasons=self.reasons.copy(),
            tokens=self.tokens.copy(),
        )


class Metrics:
    """Counts of one daemon. Owned by the server's loop; `text` and `status` may run beside it.

    Apps at the socket name themselves, and may do so anew with each request: of more than
    `APPS_MAX` those that asked nothing for longest are forgotten, with all their counts.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        by_app: dict[str, Any] = {"labelnames": ("app",), "registry": registry}
        self._requests = Counter(
            "edgekv_requests", "Requests that ended.", ("app", "reason"), registry=registry
        )
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
        self._prefills = Counter(
            "edgekv_prefills", "Prompts, by how they got KV.", ("app", "mode"), registry=registry
        )
        self._tokens = Counter(
            "edgekv_tokens", "Tokens, by what they were.", ("app", "kind"), registry=registry
        )
        self._preemptions = Counter("edgekv_preemptions", "Requests that gave way.", **by_app)
        self._lock = threading.Lock()  # guards what follows
        self._apps: OrderedDict[str, _App] = OrderedDict()  # who asked last is last

    # --- counting ---

    @contextmanager
    def request(self, app: str, request_id: str) -> Iterator[Counting]:
        """While a request of an app is answered; its end is counted, and logged as one line."""
        counting = Counting()
        with self._lock:
            known = self._app(app)
            known.running.append(counting)
        try:
            yield counting
        except Fault as fault:
            if isinstance(fault.__cause__, EdgeKVError):
                counting.failed(fault.__cause__)
            raise
        finally:
            self._ended(app, request_id, counting)

    def _app(self, name: str) -> _App:
        """What is known of an app that asks now; inside the lock."""
        known = self._apps.setdefault(name, _App())
        self._apps.move_to_end(name)
        if (num_more := len(self._apps) - APPS_MAX) > 0:
            idle = [n for n, one in self._apps.items() if not one.running and one is not known]
            for forgotten in idle[:num_more]:
                for metric, labels in self._apps.pop(forgotten).series:
                    metric.remove(*labels)
        return known

    def _ended(self, app: str, request_id: str, counting: Counting) -> None:
        recent = counting.recent(app)
        with self._lock:
            known = self._apps[app]
            known.running.remove(counting)
            known.recent.append(recent)
            known.reasons[recent.reason] += 1
            self._series(known, self._requests, app, recent.reason).inc()
            for finished in counting.ends:
                self._count(known, app, finished.stats)
        figures = {n: v for n, v in asdict(recent).items() if n not in ("app", "ended_s", "reason")}
        shown = " ".join(f"{n}={v:.0f}" for n, v in figures.items() if v is not None)
        _log.info("request=%s app=%s end=%s %s", request_id, app, recent.reason, shown)

    def _count(self, known: _App, app: str, stats: Stats) -> None:
        if stats.ttft_ms is not None:
            self._series(known, self._ttft, app).observe(stats.ttft_ms / 1e3)
        if stats.tbt_p50_ms:
            self._series(known, self._tbt, app).observe(stats.tbt_p50_ms / 1e3)
        self._series(known, self._queue, app).observe(stats.queue_ms / 1e3)
        self._series(known, self._prefills, app, stats.prefill_mode).inc()
        for kind, name in _COUNTED.items():
            number = getattr(stats, name)
            known.tokens[kind] += number
            self._series(known, self._tokens, app, kind).inc(number)
        self._series(known, self._preemptions, app).inc(stats.num_preemptions)

    def _series(self, known: _App, metric: MetricWrapperBase, *labels: str) -> Any:
        known.series.add((metric, labels))
        return metric.labels(*labels)

    # --- shown ---

    def text(self, runtime: Runtime | None, app: str | None) -> bytes:
        """For Prometheus; of one app, or of all and of what they share."""
        live = Live.of(runtime, app)
        families = [*self._registry.collect(), self._running()]
        if live is not None:
            families += live.families()
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collected(families if app is None else _of_app(families, app)))
        return generate_latest(registry)

    def _running(self) -> Metric:
        with self._lock:
            numbers = {name: len(known.running) for name, known in self._apps.items()}
        says = "Requests that run or wait."
        family = GaugeMetricFamily("edgekv_requests_running", says, labels=("app",))
        for name, number in numbers.items():
            family.add_metric((name,), number)
        return family

    def status(self, runtime: Runtime | None, app: str | None) -> dict[str, Any]:
        """What is going on, for people; of one app, or of all and of what they share."""
        live = Live.of(runtime, app)
        usage = {} if live is None else live.apps
        with self._lock:
            known = {n: one.copy() for n, one in self._apps.items() if app in (None, n)}
        recent = [one for ours in known.values() for one in ours.recent]
        running = [
            _running_status(name, one) for name, ours in known.items() for one in ours.running
        ]
        apps = [_app_status(name, ours) for name, ours in known.items()]
        apps += [_app_status(name, _App()) for name in usage if name not in known]
        for one in apps:
            one |= _usage_status(usage.get(one["name"], AppUsage()))
        last = heapq.nlargest(_SHOWN_MAX, recent, key=lambda one: one.ended_s)
        status: dict[str, Any] = {
            "apps": sorted(apps, key=lambda one: str(one["name"])),
            "running": sorted(running, key=lambda one: float(one["begun_s"]), reverse=True),
            "recent": [asdict(one) for one in last],
        }
        if live is not None and app is None:
            status |= {"pool": dict(live.pool), "disk": dict(live.disk), "swap": dict(live.swap)}
        return status


def _running_status(app: str, counting: Counting) -> dict[str, Any]:
    return {
        "app": app,
        "begun_s": counting.begun_s,
        "num_prompt": counting.num_prompt,
        "answers": counting.answers,
    }


def _app_status(name: str, known: _App) -> dict[str, Any]:
    recent = known.recent
    ttfts_ms = [one.ttft_ms for one in recent if one.ttft_ms is not None]
    tbts_ms = [one.tbt_ms for one in recent if one.tbt_ms is not None]
    return {
        "name": name,
        "num_running": len(known.running),
        "num_recent": len(recent),
        "ttft_p50_ms": percentile(ttfts_ms, 50),
        "ttft_p95_ms": percentile(ttfts_ms, 95),
        "tbt_p50_ms": percentile(tbts_ms, 50),
        "ttfts_ms": ttfts_ms,
        "tbts_ms": tbts_ms,
        "num_prompt_tokens": sum(one.num_prompt for one in recent),
        "num_cached_tokens": sum(one.num_cached for one in recent),
        "ended": dict(known.reasons),
        "tokens": dict(known.tokens),
    }


def _usage_status(usage: AppUsage) -> dict[str, Any]:
    return {
        "num_waiting": dict(usage.num_waiting),
        "num_open_sessions": usage.num_open,
        "num_stored_sessions": usage.num_stored,
        "kv_bytes": usage.kv_bytes,
    }


def _of_app(families: Iterable[Metric], app: str) -> list[Metric]:
    """What of them is an app's own."""
    for family in families:
        family.samples = [one for one in family.samples if one.labels.get("app") == app]
    return [family for family in families if family.samples]


class _Collected:
    """Families as something that can be collected."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families
