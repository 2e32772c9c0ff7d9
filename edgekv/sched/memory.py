"""Who gets KV buffers: growth of what runs, then admission of what waits. Pure."""

import functools
from collections.abc import Sequence

from edgekv.ids import RequestId, SessionId
from edgekv.kv.layout import KVLayout
from edgekv.sched.plan import IdleSession, MemoryPlan, RequestState, Snapshot


@functools.lru_cache(maxsize=16)
def tokens_max(layout: KVLayout, budget_bytes: int) -> int:
    """Most tokens that one session can ever hold in a pool of this budget.

    Sessions get buffers by capacity class, so it is the largest class that fits.
    """
    low, high = 0, layout.context_max
    while low < high:
        middle = (low + high + 1) // 2
        if layout.capacity_bytes(layout.capacity_for(middle)) <= budget_bytes:
            low = middle
        else:
            high = middle - 1
    return low


class _Ledger:
    """Bytes available as the plan takes shape, and the actions so far."""

    def __init__(self, snapshot: Snapshot, order: Sequence[RequestState]) -> None:
        self.layout = snapshot.layout
        self.available_bytes = snapshot.pool.available_bytes
        self.tokens_max = tokens_max(snapshot.layout, snapshot.pool.budget_bytes)
        self._idle = sorted(snapshot.idle, key=_last_used)
        # KV that a session brought along, and that its request does not use yet.
        self._waiting = [r for r in reversed(order) if not r.admitted and r.held_capacity]
        self.drop: list[SessionId] = []
        self.preempt: list[RequestId] = []
        self.grow: list[tuple[RequestId, int]] = []
        self.admit: list[tuple[RequestId, int]] = []

    def make_available(self, num_bytes: int, *, keep: RequestState | None = None) -> bool:
        """Make `num_bytes` available, at the cost of KV that nobody computes with.

        Idle sessions lose theirs first, least recently used first, then waiting requests, least
        urgent first. None does where all of them together would not do.

        Args:
            num_bytes: What must be available.
            keep: A waiting request that keeps its KV.
        """
        waiting = [r for r in self._waiting if r is not keep]
        droppable = sum(s.capacity for s in self._idle) + sum(r.held_capacity for r in waiting)
        if num_bytes > self.available_bytes + self.layout.capacity_bytes(droppable):
            return False
        while num_bytes > self.available_bytes and self._idle:
            session = self._idle.pop(0)
            self.drop.append(session.session_id)
            self.available_bytes += self.layout.capacity_bytes(session.capacity)
        while num_bytes > self.available_bytes:
            self.give_up(waiting.pop(0))
        return True

    def give_up(self, request: RequestState) -> None:
        """Take a request's KV away; it waits, or goes on waiting."""
        self.preempt.append(request.request_id)
        self.available_bytes += self.layout.capacity_bytes(request.held_capacity)
        if request in self._waiting:
            self._waiting.remove(request)

    def enlarge(self, request: RequestState, capacity: int) -> None:
        """Grow a running request's buffers, for which there is room."""
        self.available_bytes -= self.layout.capacity_bytes(capacity - request.held_capacity)
        self.grow.append((request.request_id, capacity))

    def let_in(self, request: RequestState, capacity: int) -> None:
        """Admit a waiting request, for which there is room."""
        self.available_bytes -= self.layout.capacity_bytes(capacity - request.held_capacity)
        self.admit.append((request.request_id, capacity))
        if request in self._waiting:
            self._waiting.remove(request)

    def growth_bytes(self, held: int, capacity: int) -> int:
        """See `KVPool.growth_bytes`."""
        difference = self.layout.capacity_bytes(capacity - held)
        return difference + held * self.layout.largest_layer_token_bytes

    def capacity_for(self, num_tokens: int) -> int:
        return self.layout.capacity_for(min(num_tokens, self.tokens_max))

    def done(self) -> MemoryPlan:
        return MemoryPlan(
            drop=tuple(self.drop),
            preempt=tuple(self.preempt),
            grow=tuple(self.grow),
            admit=tuple(self.admit),
        )


def plan_memory(snapshot: Snapshot, order: Sequence[RequestState]) -> MemoryPlan:
    """Grow what runs out of room, then admit what waits, in `order` (most urgent first)."""
    ledger = _Ledger(snapshot, order)
    for request in order:
        outgrown = request.num_tokens > request.held_capacity
        if request.admitted and outgrown and request.request_id not in ledger.preempt:
            _grow(ledger, request, order)
    if ledger.preempt:
        return ledger.done()  # what was just given up must not be taken back in the same step
    for request in order:
        if request.admitted:
            continue
        # Those behind must not overtake for ever one that needs more room.
        if request.request_id in ledger.preempt or not _admit(ledger, request):
            break
    return ledger.done()


def _grow(ledger: _Ledger, request: RequestState, order: Sequence[RequestState]) -> None:
    """Half as much again; if there is no room, the least urgent running requests give way."""
    held = request.held_capacity
    for wanted in (held + held // 2, request.num_tokens):
        capacity = ledger.capacity_for(max(wanted, request.num_tokens))
        growth_bytes = ledger.growth_bytes(held, capacity)
        if ledger.make_available(growth_bytes):
            ledger.enlarge(request, capacity)
            return
    victims, freed_bytes = [], 0
    for victim in reversed(order):
        if victim is request:
            break
        if not victim.admitted or victim.request_id in ledger.preempt:
            continue
        victims.append(victim)
        freed_bytes += ledger.layout.capacity_bytes(victim.held_capacity)
        if ledger.make_available(growth_bytes - freed_bytes):
            for each in victims:
                ledger.give_up(each)
            ledger.enlarge(request, capacity)
            return
    # Growing needs old and new side by side, which may be more than the pool has; starting anew
    # does not.
    ledger.give_up(request)


def _admit(ledger: _Ledger, request: RequestState) -> bool:
    held = request.held_capacity
    if held >= request.num_tokens:
        ledger.let_in(request, held)
        return True
    capacity = ledger.capacity_for(request.num_tokens + request.reserve_tokens)
    fresh_bytes = ledger.layout.capacity_bytes(capacity)
    if held == 0:
        if ledger.make_available(fresh_bytes):
            ledger.let_in(request, capacity)
            return True
        return False
    if ledger.make_available(ledger.growth_bytes(held, capacity), keep=request):
        ledger.let_in(request, capacity)
        return True
    # Starting anew needs less; what the request itself holds counts, and goes last.
    if ledger.make_available(fresh_bytes) and request.request_id not in ledger.preempt:
        ledger.give_up(request)
    return False


def _last_used(session: IdleSession) -> float:
    return session.last_used_ms
