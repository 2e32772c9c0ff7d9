"""What apps got and what they are owed: service by weight, in virtual time. Pure values.

The counters are those of VTC ("Fairness in Serving Large Language Models", OSDI 2024, arXiv
2401.00588), with measured milliseconds in place of tokens. An app's virtual time is its service
divided by its weight; of those that wait, the app with the least is next. Whoever comes without
having anything waiting is lifted to the least virtual time of those that wait: to have asked for
nothing stores no credit. Unlike there, the lift leaves a quantum of credit, as Linux's CFS leaves
sleepers some: an app with few short requests has none waiting for moments, and would lose what it
is owed each time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from edgekv.config import Priority
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.plan import NO_APP, AppState, RepairPlan, RequestState, SegmentPlan

Plan = SegmentPlan | RepairPlan

# What nobody is interrupted within, unless by a higher class: long enough that the order does not
# change each step, short against what a person waits for.
QUANTUM_MS = 250.0
# Without any service for so long, a background app gets a quantum before all others: a guaranteed
# share of a twentieth.
PATIENCE_MS = 20 * QUANTUM_MS


@dataclass(frozen=True)
class Accounts:
    """The apps' accounts."""

    apps: Mapping[str, AppState] = field(default_factory=dict)  # by name
    # By class, the virtual time that who comes is lifted to while nobody waits.
    lifts_ms: Mapping[Priority, float] = field(default_factory=dict)

    def register(
        self,
        name: str,
        *,
        weight: float,
        priority: Priority,
        pinned_bytes: int = 0,
        now_ms: float = float("-inf"),
    ) -> "Accounts":
        """Open an app's account, or change its terms from now on: whoever does is about to ask."""
        assert weight > 0
        app = self._app(name)
        app = replace(
            app,
            weight=weight,
            priority=priority,
            pinned_bytes=pinned_bytes,
            last_active_ms=max(app.last_active_ms, now_ms),
        )
        return self._with({name: app})

    def arrive(self, name: str, requests: Iterable[RequestState], now_ms: float) -> "Accounts":
        """A request of an app was submitted; `requests` are the unfinished ones before."""
        others = tuple(requests)
        app = replace(self._app(name), last_active_ms=now_ms)
        if name not in {r.app for r in others}:
            app = replace(app, unserved_since_ms=now_ms, aged_ms=0.0)
        waiting = apps_waiting(others)
        if name not in waiting:
            lift_ms = self._lift_ms(app.priority, waiting, others) - QUANTUM_MS / app.weight
            app = replace(app, virtual_ms=max(app.virtual_ms, lift_ms))
        return self._with({name: app})

    def charge(
        self, service_ms: Mapping[str, float], requests: Iterable[RequestState], now_ms: float
    ) -> "Accounts":
        """A step has ended, of which apps had `service_ms`; `requests` are the unfinished ones."""
        served = {name: _served(self._app(name), ms, now_ms) for name, ms in service_ms.items()}
        after = self._with(served)
        unfinished = tuple(requests)
        waiting = apps_waiting(unfinished)
        lifts_ms = {
            priority: after._lift_ms(priority, waiting, unfinished)
            for priority in {app.priority for app in after.apps.values()}
        }
        return replace(after, lifts_ms=lifts_ms)

    def charge_restore(self, name: str, ms: float) -> "Accounts":
        """An app's KV was read back: service, though not of the kind that one starves without."""
        app = self._app(name)
        return self._with({name: replace(app, virtual_ms=app.virtual_ms + ms / app.weight)})

    def _app(self, name: str) -> AppState:
        return self.apps.get(name, NO_APP)

    def _with(self, changed: Mapping[str, AppState]) -> "Accounts":
        return replace(self, apps={**self.apps, **changed})

    def _lift_ms(
        self, priority: Priority, waiting: frozenset[str], requests: tuple[RequestState, ...]
    ) -> float:
        """Least virtual time of those that wait; most of those that are served if nobody does.

        It never falls: where nobody is left, it is where the last one was.
        """
        last_ms = self.lifts_ms.get(priority, 0.0)
        wait_ms = [a.virtual_ms for a in map(self._app, waiting) if a.priority == priority]
        if wait_ms:
            return max(last_ms, min(wait_ms))
        served = map(self._app, {r.app for r in requests})
        return max([last_ms, *(a.virtual_ms for a in served if a.priority == priority)])


def _served(app: AppState, ms: float, now_ms: float) -> AppState:
    app = replace(app, virtual_ms=app.virtual_ms + ms / app.weight, last_active_ms=now_ms)
    aged_ms = app.aged_ms + ms
    if aged(app, now_ms) and aged_ms < QUANTUM_MS:
        return replace(app, aged_ms=aged_ms)
    return replace(app, unserved_since_ms=now_ms, aged_ms=0.0)


def aged(app: AppState, now_ms: float) -> bool:
    """Whether an app was kept from all service for too long, and has not had a quantum since."""
    return now_ms - app.unserved_since_ms >= PATIENCE_MS


def apps_waiting(requests: Iterable[RequestState]) -> frozenset[str]:
    """Apps that would be served more if it were their turn: not all their requests decode."""
    return frozenset(r.app for r in requests if not r.decoding)


def split_service(
    segments: Sequence[Plan], elapsed_ms: float, cost: CostModel
) -> dict[Plan, float]:
    """A step's milliseconds by segment and repair.

    By what each segment adds to the step's cost. The fixed part, reading the weights, is needed as
    much by one row as by a hundred, and is shared equally (so each pays its Shapley value).
    """
    if not segments:
        return {}
    fixed_ms = cost.step_ms(EMPTY_STEP)
    parts = {s: fixed_ms / len(segments) + cost.added_ms(s.added_to(EMPTY_STEP)) for s in segments}
    total_ms = sum(parts.values())
    if total_ms <= 0:
        return dict.fromkeys(parts, elapsed_ms / len(segments))
    return {segment: elapsed_ms * ms / total_ms for segment, ms in parts.items()}
