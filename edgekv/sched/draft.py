"""A memory plan as it takes shape: what is available, what is taken from whom. Pure."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgekv.ids import RequestId, SessionId
from edgekv.sched.plan import MemoryPlan, RequestState, Snapshot


@dataclass(frozen=True)
class _Holding:
    """KV that could be taken: of an idle session, or of a request, waiting or running."""

    app: str
    num_bytes: int
    idle: SessionId | None = None
    request: RequestId | None = None
    arriving: bool = False


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
        capacity_bytes = self.layout.capacity_bytes
        self._idle = {
            s.session_id: _Holding(s.app, capacity_bytes(s.capacity), idle=s.session_id)
            for s in sorted(snapshot.idle, key=lambda s: s.last_used_ms)
        }
        # KV that a session brought along, and that its request does not use yet.
        self._waiting = {
            p.request_id: _Holding(p.app, capacity_bytes(p.capacity), request=p.request_id)
            for p in snapshot.parked
        }
        self._running: dict[RequestId, _Holding] = {}
        for request in reversed(order):
            if request.admitted:
                self._running[request.request_id] = self._holding(request)
            elif request.held_capacity:
                self._waiting[request.request_id] = self._holding(request)
        self._by_app: Counter[str] = Counter()
        for holding in self._holdings(self._running.values()):
            self._by_app[holding.app] += holding.num_bytes
        self.pins = granted(snapshot.pins, self._hard_bytes)
        self._pinned_bytes = sum(self.pins.values())
        self.settled: set[RequestId] = set()  # one request, one fate
        self.drop: list[SessionId] = []
        self.preempt: list[RequestId] = []
        self.grow: list[tuple[RequestId, int]] = []
        self.admit: list[tuple[RequestId, int]] = []

    def _holding(self, request: RequestState) -> _Holding:
        num_bytes = self.layout.capacity_bytes(request.held_capacity)
        return _Holding(
            request.app, num_bytes, request=request.request_id, arriving=request.arriving
        )

    def _holdings(self, running: Iterable[_Holding]) -> list[_Holding]:
        """What could be taken, in this order."""
        return [*self._idle.values(), *self._waiting.values(), *running]

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
        others = self._pinned_bytes - self.pins.get(request.app, 0)
        return num_bytes <= self._hard_bytes - others

    def _available_bytes(self, request: RequestState) -> int:
        """What a request may get: the soft budget is not for the last one, somebody must run."""
        alone = len(self._running) == (request.request_id in self._running)
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
        if missing <= 0:
            return []
        running = [self._holding(r) for r in victims]
        taken: list[_Holding] = []
        for holding in self._takeable(self._holdings(running), request, pins=pins):
            taken.append(holding)
            missing -= holding.num_bytes
            if missing <= 0:
                break
        else:
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
    ) -> Iterator[_Holding]:
        """What is another's, and not of an app that has no more than what is pinned for it."""
        left = self._by_app.copy() if pins and self.pins else None
        for holding in holdings:
            if holding.request == request.request_id:
                continue
            if left is not None:
                pinned_bytes = self.pins.get(holding.app, 0)
                if holding.app != request.app and left[holding.app] <= pinned_bytes:
                    continue
                left[holding.app] -= holding.num_bytes
            yield holding

    def _take(self, holding: _Holding) -> None:
        self._used_bytes -= holding.num_bytes
        self._by_app[holding.app] -= holding.num_bytes
        if holding.idle is not None:
            del self._idle[holding.idle]
            self.drop.append(holding.idle)
        elif holding.request is not None:
            self._waiting.pop(holding.request, None)
            self._running.pop(holding.request, None)
            self.preempt.append(holding.request)
            self.settled.add(holding.request)

    def shed(self) -> None:
        """Down to the soft budget, at the cost of all but the most urgent running request."""
        running = [h for h in [*self._running.values()][:-1] if not h.arriving]
        for holding in self._holdings(running):
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
        self._waiting.pop(request.request_id, None)
        self._running[request.request_id] = _Holding(
            request.app, self.layout.capacity_bytes(capacity), request=request.request_id
        )
        self.admit.append((request.request_id, capacity))

    def _give(self, request: RequestState, capacity: int) -> None:
        held_bytes = self.layout.capacity_bytes(request.held_capacity)
        num_bytes = self.layout.capacity_bytes(capacity) - held_bytes
        self._used_bytes += num_bytes
        self._by_app[request.app] += num_bytes
        self.settled.add(request.request_id)


def granted(pins: Mapping[str, int], budget_bytes: int) -> Mapping[str, int]:
    """Pins that hold together, those given first before others.

    Who wants more than is left of the budget gets none: else nobody could run beside all pins, and
    so none would hold.
    """
    if sum(pins.values()) <= budget_bytes:
        return pins
    kept = {}
    for app, num_bytes in pins.items():
        if num_bytes <= budget_bytes:
            kept[app] = num_bytes
            budget_bytes -= num_bytes
    return kept
