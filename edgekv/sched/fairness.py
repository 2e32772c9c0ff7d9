"""What apps got and what they are owed: service by weight, in virtual time. Pure.

The counters are those of VTC ("Fairness in Serving Large Language Models", OSDI 2024, arXiv
2401.00588), with measured milliseconds in place of tokens. An app's virtual time is its service
divided by its weight; of those that wait, the app with the least is next. Whoever comes without
having anything waiting is lifted to the least virtual time of those that wait: to have asked for
nothing stores no credit. Unlike there, the lift leaves a quantum of credit, as Linux's CFS leaves
sleepers some: an app with few short requests has none waiting for moments, and would lose what it
is owed each time.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from edgekv.config import PRIORITIES, Priority
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.demand import Demand
from edgekv.sched.plan import NO_APP, AppState, RepairPlan, SegmentPlan

Plan = SegmentPlan | RepairPlan

# What nobody is interrupted within, unless by a higher class: long enough that the order does not
# change each step, short against what a person waits for.
QUANTUM_MS = 250.0
# Without any service for so long, background apps get a quantum before all others: a guaranteed
# share of a twentieth, of all of them together. For each, twenty apps would leave others nothing.
PATIENCE_MS = 20 * QUANTUM_MS
SETTLED_MAX = 100  # accounts that end with one step, at most: a tenth of a millisecond


class Accounts:
    """The apps' accounts. Owned by whoever carries plans out.

    An app with the usual terms has an account from its first request until it rests and owes
    nothing: then a new account would say the same. So names that are only looked up, or were in
    use long ago, cost nothing.

    Attributes:
        apps: The accounts, by name.
        pins: KV memory that is pinned for an app, by name; of those that have any.
        attended_ms: When interactive work was last expected, asked for, or served.
        aged_turn_ms: When those that were kept waiting too long last had a quantum.
    """

    def __init__(self) -> None:
        self._apps: dict[str, AppState] = {}
        self._pins: dict[str, int] = {}
        self.apps: Mapping[str, AppState] = MappingProxyType(self._apps)
        self.pins: Mapping[str, int] = MappingProxyType(self._pins)
        self.attended_ms = float("-inf")
        self.aged_turn_ms = float("-inf")
        self._aged_ms = 0.0  # service of the next such quantum
        # By class, the virtual time that who comes is lifted to while nobody waits.
        self._lifts_ms: dict[Priority, float] = dict.fromkeys(PRIORITIES, 0.0)
        # Accounts with the usual terms that may be over, by virtual time: a heap, each name once.
        self._resting: list[tuple[float, str]] = []
        self._rests: set[str] = set()

    def register(
        self,
        name: str,
        *,
        weight: float = 1.0,
        priority: Priority = "interactive",
        pinned_bytes: int = 0,
        now_ms: float = float("-inf"),
    ) -> None:
        """Change an app's terms from now on; whoever does is about to ask."""
        assert weight > 0
        if priority == "interactive":
            self.attended_ms = max(self.attended_ms, now_ms)
        if pinned_bytes:
            self._pins[name] = pinned_bytes
        else:
            self._pins.pop(name, None)
        app = self.app(name)
        if app.priority != priority:
            # Classes have virtual times of their own: what it owes in the one it owes in the other.
            owed_ms = max(0.0, app.virtual_ms - self._lifts_ms[app.priority])
            app = replace(app, priority=priority, virtual_ms=self._lifts_ms[priority] + owed_ms)
        app = replace(app, weight=weight)
        if name in self._apps or not self._is_usual(name, app):
            self._apps[name] = app
            self.rest(name)

    def arrive(self, name: str, demand: Demand, now_ms: float) -> None:
        """A request of an app was submitted; `demand` is what was there before."""
        app = self.app(name)
        if app.priority == "interactive":
            self.attended_ms = max(self.attended_ms, now_ms)
        if name not in demand.unfinished:
            app = replace(app, unserved_since_ms=now_ms)
        if name not in demand.waiting:
            lift_ms = self._lift_ms(app.priority, demand) - QUANTUM_MS / app.weight
            app = replace(app, virtual_ms=max(app.virtual_ms, lift_ms))
        self._apps[name] = app

    def charge(self, service_ms: Mapping[str, float], demand: Demand, now_ms: float) -> None:
        """A step has ended, of which apps had `service_ms`; `demand` is what there is then."""
        for name, ms in service_ms.items():
            known = self._apps.get(name)
            if known is None:  # it rests, and its KV is repaired
                lift_ms = self._lifts_ms[NO_APP.priority] - QUANTUM_MS
                known = replace(NO_APP, virtual_ms=max(NO_APP.virtual_ms, lift_ms))
            app = self._apps[name] = self._served(known, ms, now_ms)
            if name not in demand.unfinished:
                self.rest(name)
            if app.priority == "interactive":
                self.attended_ms = max(self.attended_ms, now_ms)
        self._lifts_ms = {priority: self._lift_ms(priority, demand) for priority in PRIORITIES}
        self._settle(demand)

    def _served(self, app: AppState, ms: float, now_ms: float) -> AppState:
        app = replace(app, virtual_ms=app.virtual_ms + ms / app.weight)
        if app.priority == "background" and aged(app, now_ms, self.aged_turn_ms):
            self._aged_ms += ms
            if self._aged_ms < QUANTUM_MS:
                return app  # it goes on
            self.aged_turn_ms, self._aged_ms = now_ms, 0.0
        return replace(app, unserved_since_ms=now_ms)

    def charge_restore(self, name: str, ms: float) -> None:
        """An app's KV was read back: service, though not of the kind that one starves without."""
        app = self.app(name)
        self._apps[name] = replace(app, virtual_ms=app.virtual_ms + ms / app.weight)

    def rest(self, name: str) -> None:
        """An app has no unfinished request, or its terms have changed."""
        app = self.app(name)
        if name in self._apps and name not in self._rests and self._is_usual(name, app):
            self._rests.add(name)
            heapq.heappush(self._resting, (app.virtual_ms, name))

    def _settle(self, demand: Demand) -> None:
        """Drop the accounts that a new one would be like: see `arrive`."""
        limit_ms = self._lifts_ms[NO_APP.priority] - QUANTUM_MS / NO_APP.weight
        for _ in range(SETTLED_MAX):
            if not self._resting or self._resting[0][0] > limit_ms:
                return
            _, name = heapq.heappop(self._resting)
            self._rests.remove(name)
            app = self.app(name)
            if name in demand.unfinished or not self._is_usual(name, app):
                continue  # it is told of again when it rests
            if app.virtual_ms <= limit_ms:
                del self._apps[name]
            else:
                self.rest(name)

    def _is_usual(self, name: str, app: AppState) -> bool:
        terms = (app.weight, app.priority)
        return terms == (NO_APP.weight, NO_APP.priority) and name not in self._pins

    def app(self, name: str) -> AppState:
        """An app's account, or what a new one would be."""
        return self._apps.get(name, NO_APP)

    def _lift_ms(self, priority: Priority, demand: Demand) -> float:
        """Least virtual time of those that wait; most of those that are served if nobody does.

        It never falls: where nobody is left, it is where the last one was.
        """
        last_ms = self._lifts_ms[priority]
        wait_ms = self._virtual_ms(demand.waiting, priority)
        if wait_ms:
            return max(last_ms, min(wait_ms))
        return max([last_ms, *self._virtual_ms(demand.unfinished, priority)])

    def _virtual_ms(self, names: Collection[str], priority: Priority) -> list[float]:
        return [app.virtual_ms for app in map(self.app, names) if app.priority == priority]


def aged(app: AppState, now_ms: float, turn_ms: float) -> bool:
    """Whether an app was kept from all service for too long, and it is the turn of those.

    `turn_ms` is when they last had a quantum.
    """
    return now_ms - max(app.unserved_since_ms, turn_ms) >= PATIENCE_MS


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
