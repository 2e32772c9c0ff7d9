"""What a runtime has at this moment, for Prometheus and for people."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Self

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from edgekv.config import PRIORITIES
from edgekv.errors import EngineFailed, RuntimeClosed
from edgekv.metrics import AppUsage
from edgekv.runtime import Runtime

APPS_MAX = 100  # that have figures of their own
OTHERS = "(others)"  # of all the others together


@dataclass(frozen=True, kw_only=True)
class Live:
    """Figures of one moment.

    Attributes:
        apps: What each app has, by name.
        service_ms: Compute that each app had so far.
        pool, disk: Bytes by kind, and the sessions on disk; empty for who may see one app alone.
        swap: What moved between memory and disk so far; the same.
    """

    apps: Mapping[str, AppUsage]
    service_ms: Mapping[str, float]
    pool: Mapping[str, int]
    disk: Mapping[str, int]
    swap: Mapping[str, float]

    @classmethod
    def of(cls, runtime: Runtime | None, app: str | None) -> Self | None:
        """Of all apps, or of one; None if nothing is loaded, or it has just ended.

        Waits for the engine's next step.
        """
        if runtime is None:
            return None
        try:
            usage, counters = runtime.usage(), runtime.counters()
            if app is not None:
                return cls(
                    apps={app: usage.get(app, AppUsage())},
                    service_ms={app: counters.service_ms.get(app, 0.0)},
                    pool={},
                    disk={},
                    swap={},
                )
            return cls(
                apps=_bounded(usage),
                service_ms={n: ms for n, ms in counters.service_ms.items() if n in usage},
                pool=_memory(runtime),
                disk=_disk(runtime),
                swap=asdict(counters.swap),
            )
        except (RuntimeClosed, EngineFailed):
            return None

    def families(self) -> Iterator[Metric]:
        """The same for Prometheus."""
        queue = GaugeMetricFamily(
            "edgekv_queue_length", "Requests that wait.", labels=("app", "class")
        )
        sessions = GaugeMetricFamily("edgekv_sessions", "Sessions.", labels=("app", "state"))
        memory = GaugeMetricFamily("edgekv_app_kv_bytes", "KV memory of an app.", labels=("app",))
        for name, usage in self.apps.items():
            for priority in PRIORITIES:
                queue.add_metric((name, priority), usage.num_waiting[priority])
            sessions.add_metric((name, "open"), usage.num_open)
            sessions.add_metric((name, "stored"), usage.num_stored)
            memory.add_metric((name,), usage.kv_bytes)
        service = CounterMetricFamily("edgekv_service_seconds", "Compute had.", labels=("app",))
        for name, ms in self.service_ms.items():
            if name in self.apps:
                service.add_metric((name,), ms / 1e3)
        yield from (queue, sessions, memory, service)
        yield from (
            _gauge("edgekv_pool_bytes", "KV memory.", "kind", self.pool),
            _gauge("edgekv_disk_bytes", "KV on disk.", "kind", self.disk),
            _gauge("edgekv_swap", "What moved so far.", "what", self.swap),
        )


def _gauge(name: str, says: str, label: str, figures: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(name, says, labels=(label,))
    for kind, number in figures.items():
        family.add_metric((kind,), number)
    return family


def _bounded(usage: Mapping[str, AppUsage]) -> dict[str, AppUsage]:
    """Those that have the most going on, by name; of more than are shown the sum."""

    def busy(name: str) -> tuple[int, int, int]:
        one = usage[name]
        num_requests = one.num_waiting.total() + one.num_running.total()
        return num_requests, one.num_open, one.num_stored

    names = sorted(usage, key=busy, reverse=True)
    shown = {name: usage[name] for name in names[:APPS_MAX]}
    if rest := [usage[name] for name in names[APPS_MAX:]]:
        shown[OTHERS] = AppUsage(
            num_waiting=sum((one.num_waiting for one in rest), Counter()),
            num_running=sum((one.num_running for one in rest), Counter()),
            kv_bytes=sum(one.kv_bytes for one in rest),
            num_open=sum(one.num_open for one in rest),
            num_stored=sum(one.num_stored for one in rest),
        )
    return shown


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
    return {name: value for name, value in asdict(snapshot).items() if name.endswith("bytes")}
