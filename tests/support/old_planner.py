"""How the next step was planned before plans looked at the heads of lines alone: the slow twin.

Everybody who waits is looked at, every holding is listed, and all are put in order, in each plan.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.sched.compose import arrivals_expected, compose
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import QUANTUM_MS, aged
from edgekv.sched.memory import MayPreempt, tokens_max
from edgekv.sched.plan import MemoryPlan, RequestState, Snapshot, StepPlan
from edgekv.sched.policy import FcfsPolicy
from edgekv.sched.scheduler import SchedulerConfig

_AGED, _INTERACTIVE, _BACKGROUND = range(3)


@dataclass(frozen=True)
class _Holding:
    """KV that could be taken: of an idle session, or of a request, waiting or running."""

    app: str
    num_bytes: int
    idle: SessionId | None = None
    request: RequestState | None = None


class Draft:
    """Bytes and actions of a plan. Owned by the planner that fills it.

    `order` is the snapshot's requests, most urgent first; no session holds more than `tokens_max`.
    """

    def __init__(self, snapshot: Snapshot, order: Sequence[RequestState], tokens_max: int) -> None:
        self.layout = snapshot.layout
        self._tokens_max = tokens_max
        self._hard_bytes = self._soft_bytes = snapshot.pool.sessions_bytes
        if snapshot.soft_budget_bytes is not None:
            self._soft_bytes = min(self._hard_bytes, snapshot.soft_budget_bytes)
        self._used_bytes = snapshot.pool.used_bytes
        self._leaving_bytes = snapshot.leaving_bytes  # free before long, but not yet
        self._idle = [
            _Holding(s.app, self.layout.capacity_bytes(s.capacity), idle=s.session_id)
            for s in sorted(snapshot.idle, key=lambda s: s.last_used_ms)
        ]
        # KV that a session brought along, and that its request does not use yet.
        self._waiting = [
            self._holding(r) for r in reversed(order) if not r.admitted and r.held_capacity
        ]
        self._running = [self._holding(r) for r in reversed(order) if r.admitted]
        self._by_app: Counter[str] = Counter()
        for holding in (*self._idle, *self._waiting, *self._running):
            self._by_app[holding.app] += holding.num_bytes
        self.pins = dict(snapshot.pins)
        self.settled: set[RequestId] = set()  # one request, one fate
        self.drop: list[SessionId] = []
        self.preempt: list[RequestId] = []
        self.grow: list[tuple[RequestId, int]] = []
        self.admit: list[tuple[RequestId, int]] = []

    def _holding(self, request: RequestState) -> _Holding:
        num_bytes = self.layout.capacity_bytes(request.held_capacity)
        return _Holding(request.app, num_bytes, request=request)

    def done(self) -> MemoryPlan:
        """The plan."""
        return MemoryPlan(
            drop=tuple(self.drop),
            preempt=tuple(self.preempt),
            grow=tuple(self.grow),
            admit=tuple(self.admit),
        )

    # --- what there is ---

    def capacity_for(self, num_tokens: int) -> int:
        """Class of buffers for so many tokens, or the largest that a session can have."""
        return self.layout.capacity_for(min(num_tokens, self._tokens_max))

    def within_pin(self, request: RequestState, num_bytes: int) -> bool:
        """Whether a request's app has no more than it is guaranteed with `num_bytes` more."""
        return self._by_app[request.app] + num_bytes <= self.pins.get(request.app, 0)

    def fits_beside_pins(self, request: RequestState, num_bytes: int) -> bool:
        """Whether a request has room for `num_bytes` when all other apps have what is theirs."""
        others = sum(pinned for app, pinned in self.pins.items() if app != request.app)
        return num_bytes <= self._hard_bytes - others

    def _available_bytes(self, request: RequestState) -> int:
        """What a request may get: the soft budget is not for the last one, somebody must run."""
        alone = all(h.request is request for h in self._running)
        return (self._hard_bytes if alone else self._soft_bytes) - self._used_bytes

    def is_there(self, num_bytes: int, request: RequestState) -> bool:
        """Whether what `free` made available can be had now, and not only once others have left."""
        return num_bytes <= self._available_bytes(request)

    def set_aside(self, num_bytes: int) -> None:
        """Keep what is about to be free for somebody who waits for it."""
        self._leaving_bytes -= num_bytes

    # --- what is taken ---

    def free(
        self,
        num_bytes: int,
        request: RequestState,
        victims: Sequence[RequestState] = (),
        *,
        pins: bool = True,
    ) -> bool:
        """Make `num_bytes` available for a request, or change nothing.

        Idle sessions lose their KV first, least recently used first, then waiting requests, least
        urgent first, then running ones: `victims`, in this order. With `pins` other apps keep what
        they are guaranteed.
        """
        taken = self.enough(num_bytes, request, victims, pins=pins)
        for holding in taken or ():
            self._take(holding)
        return taken is not None

    def enough(
        self, num_bytes: int, request: RequestState, victims: Sequence[RequestState], *, pins: bool
    ) -> list[_Holding] | None:
        """What `free` would take, no more than needed; None: it would not succeed."""
        missing = num_bytes - self._available_bytes(request) - self._leaving_bytes
        running = [self._holding(r) for r in victims]
        taken: list[_Holding] = []
        for holding in self._takeable([*self._idle, *self._waiting, *running], request, pins=pins):
            if missing <= 0:
                break
            taken.append(holding)
            missing -= holding.num_bytes
        if missing > 0:
            return None
        # A large one at the end may make small ones before it unnecessary.
        cached = [h for h in taken if h not in running]
        for holding in [h for h in taken if h in running] + cached[::-1]:
            if missing + holding.num_bytes <= 0:
                taken.remove(holding)
                missing += holding.num_bytes
        return taken

    def _takeable(
        self, holdings: Iterable[_Holding], request: RequestState, *, pins: bool
    ) -> list[_Holding]:
        """What is another's, and not of an app that has no more than what is pinned for it."""
        left = self._by_app.copy()
        takeable = []
        for holding in holdings:
            guarded = pins and holding.app != request.app
            if holding.request is request:
                continue
            if guarded and left[holding.app] <= self.pins.get(holding.app, 0):
                continue
            left[holding.app] -= holding.num_bytes
            takeable.append(holding)
        return takeable

    def _take(self, holding: _Holding) -> None:
        for holdings in (self._idle, self._waiting, self._running):
            if holding in holdings:
                holdings.remove(holding)
        self._used_bytes -= holding.num_bytes
        self._by_app[holding.app] -= holding.num_bytes
        if holding.request is not None:
            self.preempt.append(holding.request.request_id)
            self.settled.add(holding.request.request_id)
        elif holding.idle is not None:
            self.drop.append(holding.idle)

    def shed(self) -> None:
        """Down to the soft budget, at the cost of all but the most urgent running request."""
        running = [h for h in self._running[:-1] if h.request and not h.request.arriving]
        for holding in [*self._idle, *self._waiting, *running]:
            if self._used_bytes - self._leaving_bytes <= self._soft_bytes:
                return
            self._take(holding)

    def give_up(self, request: RequestState) -> None:
        """Take a request's KV away; it waits, or goes on waiting."""
        self._take(self._holding(request))

    # --- what is given ---

    def enlarge(self, request: RequestState, capacity: int) -> None:
        """Grow a running request's buffers, for which there is room."""
        self._give(request, capacity)
        self.grow.append((request.request_id, capacity))

    def let_in(self, request: RequestState, capacity: int) -> None:
        """Admit a waiting request, for which there is room."""
        self._give(request, capacity)
        self._waiting = [h for h in self._waiting if h.request is not request]
        self._running.append(
            _Holding(request.app, self.layout.capacity_bytes(capacity), request=request)
        )
        self.admit.append((request.request_id, capacity))

    def _give(self, request: RequestState, capacity: int) -> None:
        num_bytes = self.layout.capacity_bytes(capacity - request.held_capacity)
        self._used_bytes += num_bytes
        self._by_app[request.app] += num_bytes
        self.settled.add(request.request_id)


def plan_memory(
    snapshot: Snapshot, order: Sequence[RequestState], may_preempt: MayPreempt
) -> MemoryPlan:
    """Grow what runs out of room, then admit what waits; `order` is most urgent first."""
    limit = tokens_max(snapshot.layout, snapshot.pool.sessions_bytes)
    draft = Draft(snapshot, order, limit)
    draft.shed()
    for request in order:
        outgrown = request.num_tokens > request.held_capacity
        if request.admitted and outgrown and request.request_id not in draft.settled:
            _grow(draft, request, order)
    if draft.preempt:
        return draft.done()  # what was just given up must not be taken back in the same step
    _admit_in_order(draft, order, may_preempt)
    return draft.done()


def _grow(draft: Draft, request: RequestState, order: Sequence[RequestState]) -> None:
    """Half as much again; if there is no room, the least urgent running requests give way."""
    held = request.held_capacity
    for wanted in (held + held // 2, request.num_tokens):
        capacity = draft.capacity_for(max(wanted, request.num_tokens))
        growth_bytes = draft.layout.growth_bytes(held, capacity)
        if draft.free(growth_bytes, request):
            break
    else:
        victims = _victims(draft, request, order, growth_bytes)
        if not draft.free(growth_bytes, request, victims):
            # Growing needs old and new side by side, which may be more than the pool has; starting
            # anew does not.
            draft.give_up(request)
            return
    if draft.is_there(growth_bytes, request):
        draft.enlarge(request, capacity)
    else:
        draft.set_aside(growth_bytes)


def _victims(
    draft: Draft,
    request: RequestState,
    order: Sequence[RequestState],
    num_bytes: int,
    may_preempt: MayPreempt | None = None,
) -> list[RequestState]:
    """Running requests that give way to another, least urgent first.

    Of those behind it, all, or whom the policy lets go. And where all that it wants is pinned for
    its app, other apps have only borrowed it: it gets it back at once, unless from a request that
    could never run beside the pins.
    """
    claims = draft.within_pin(request, num_bytes)
    position = order.index(request)
    victims = []
    for i, victim in reversed([*enumerate(order)]):
        if not victim.admitted or victim.arriving or victim.request_id in draft.settled:
            continue
        held_bytes = draft.layout.capacity_bytes(victim.held_capacity)
        borrows = (
            claims and victim.app != request.app and draft.fits_beside_pins(victim, held_bytes)
        )
        behind = i > position and (may_preempt is None or may_preempt(request, victim))
        if borrows or behind:
            victims.append(victim)
    return victims


def _admit_in_order(draft: Draft, order: Sequence[RequestState], may_preempt: MayPreempt) -> None:
    blocked = False
    for request in order:
        if request.admitted or request.leaving:
            continue
        # Those behind must not overtake for ever one that needs more room, unless the room is
        # theirs.
        if blocked and not draft.within_pin(request, _wanted_bytes(draft, request)):
            continue
        blocked |= not _admit(draft, request, order, may_preempt)
        if draft.preempt or (blocked and not draft.pins):
            return  # one exchange at a time; the next plan sees what came of it


def _wanted_capacity(draft: Draft, request: RequestState) -> int:
    if request.held_capacity >= request.num_tokens:
        return request.held_capacity
    return draft.capacity_for(request.num_tokens + request.reserve_tokens)


def _wanted_bytes(draft: Draft, request: RequestState) -> int:
    return draft.layout.capacity_bytes(_wanted_capacity(draft, request) - request.held_capacity)


def _admit(
    draft: Draft, request: RequestState, order: Sequence[RequestState], may_preempt: MayPreempt
) -> bool:
    """Let a waiting request in: beside those who run, else in place of those who may give way."""
    capacity = _wanted_capacity(draft, request)
    if capacity == request.held_capacity:
        draft.let_in(request, capacity)
        return True
    if _admit_beside(draft, request, capacity, []):
        return True
    if request.request_id in draft.settled:
        return False  # it gave up what it held, and is admitted anew
    victims = _victims(draft, request, order, _wanted_bytes(draft, request), may_preempt)
    return bool(victims) and _admit_beside(draft, request, capacity, victims)


def _admit_beside(
    draft: Draft, request: RequestState, capacity: int, victims: list[RequestState]
) -> bool:
    held = request.held_capacity
    fresh_bytes = draft.layout.capacity_bytes(capacity)
    # Pins hold unless the request could never run beside them.
    pins = draft.fits_beside_pins(request, fresh_bytes)
    need_bytes = draft.layout.growth_bytes(held, capacity) if held else fresh_bytes
    if draft.free(need_bytes, request, victims, pins=pins):
        if draft.is_there(need_bytes, request):
            draft.let_in(request, capacity)
        else:
            draft.set_aside(need_bytes)  # those behind take none of it, and need not wait
        return True
    # Starting anew needs less room than growing.
    own_bytes = draft.layout.capacity_bytes(held)
    if held and draft.enough(fresh_bytes - own_bytes, request, victims, pins=pins) is not None:
        draft.give_up(request)
    return False


def order(now_ms: float, snapshot: Snapshot, cost: CostModel, *, fair: bool) -> list[RequestState]:
    """By class, virtual time in quanta, and urgency; or by arrival."""
    if not fair:
        return sorted(snapshot.requests, key=lambda r: (r.arrival_ms, r.request_id))
    places: dict[tuple[str, Priority], tuple[int, int]] = {}  # of an app, once a plan

    def key(request: RequestState) -> tuple[tuple[int, int], float, float, int]:
        who = (request.app, request.priority)
        if who not in places:
            quantum = _quantum_of(request, snapshot)
            places[who] = (_class_of(request, now_ms, snapshot), quantum)
        urgency_ms = _urgency(request, now_ms, snapshot, cost)
        return (places[who], urgency_ms, request.arrival_ms, request.request_id)

    return sorted(snapshot.requests, key=key)


def plan_step(
    now_ms: float, snapshot: Snapshot, cost: CostModel, config: SchedulerConfig
) -> StepPlan:
    """As `edgekv.sched.scheduler` does it, of a snapshot with everybody in it."""
    policy = config.policy
    requests = order(now_ms, snapshot, cost, fair=not isinstance(policy, FcfsPolicy))
    memory = plan_memory(
        snapshot,
        requests,
        lambda waiting, running: policy.may_preempt(waiting, running, now_ms, snapshot),
    )
    if memory:
        return StepPlan(memory=memory)
    front: list[RequestState] = []
    back: list[RequestState] = []
    for request in (r for r in requests if r.computes):
        (back if policy.in_background(request, now_ms, snapshot) else front).append(request)
    return compose(
        front,
        back,
        cost,
        tbt_target_ms=config.tbt_target_ms,
        rows_max=config.prefill_rows_max,
        arrivals_expected=arrivals_expected(snapshot, now_ms),
        repairs=snapshot.repairs,
    )


def _class_of(request: RequestState, now_ms: float, snapshot: Snapshot) -> int:
    if request.priority == "interactive":
        return _INTERACTIVE
    return _AGED if aged(snapshot.app(request.app), now_ms, snapshot.aged_turn_ms) else _BACKGROUND


def _quantum_of(request: RequestState, snapshot: Snapshot) -> int:
    """The app's virtual time in quanta of the app that has the largest weight."""
    app = snapshot.app(request.app)
    return int(app.virtual_ms * snapshot.weight_max / QUANTUM_MS)


def _urgency(request: RequestState, now_ms: float, snapshot: Snapshot, cost: CostModel) -> float:
    """Milliseconds until its next token, less those that it has waited; lowest first.

    Decoding requests have no turn to wait for. Where one must give way it is the one that got most.
    """
    if request.decoding:
        return request.resident_ms
    kept = max(request.num_computed, request.num_stored)
    rows_ms = cost.added_ms(EMPTY_STEP.plus(max(0, request.num_tokens - kept), kept))
    restore_ms = (kept - request.num_computed) * snapshot.restore_ms_per_token
    since_ms = request.arrival_ms if request.admitted else request.queued_ms
    waited_ms = now_ms - (request.arrival_ms if since_ms is None else since_ms)
    return rows_ms + restore_ms - waited_ms
