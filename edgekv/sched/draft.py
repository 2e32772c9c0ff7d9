"""A memory plan as it takes shape: what is available, what is taken from whom. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgekv.ids import RequestId, SessionId
from edgekv.sched.plan import MemoryPlan, RequestState, Snapshot


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
        pins = {name: app.pinned_bytes for name, app in snapshot.apps.items()}
        self.pins = {name: pinned_bytes for name, pinned_bytes in pins.items() if pinned_bytes}
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
