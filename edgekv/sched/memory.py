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

    def __init__(self, snapshot: Snapshot) -> None:
        self.layout = snapshot.layout
        self.available_bytes = snapshot.pool.available_bytes
        self._idle = sorted(snapshot.idle, key=_last_used)
        self.tokens_max = tokens_max(snapshot.layout, snapshot.pool.budget_bytes)
        self.drop: list[SessionId] = []
        self.preempt: list[RequestId] = []
        self.grow: list[tuple[RequestId, int]] = []
        self.admit: list[tuple[RequestId, int]] = []

    def make_available(self, num_bytes: int) -> bool:
        """Drop idle sessions, least recently used first, until `num_bytes` are available.

        Drops none where dropping all would not do.
        """
        droppable = sum(self.layout.capacity_bytes(s.capacity) for s in self._idle)
        if num_bytes > self.available_bytes + droppable:
            return False
        while num_bytes > self.available_bytes:
            session = self._idle.pop(0)
            self.drop.append(session.session_id)
            self.available_bytes += self.layout.capacity_bytes(session.capacity)
        return True

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
    ledger = _Ledger(snapshot)
    for request in order:
        outgrown = request.num_tokens > request.held_capacity
        if request.admitted and outgrown and request.request_id not in ledger.preempt:
            _grow(ledger, request, order)
    if ledger.preempt:
        return ledger.done()  # what was just given up must not be taken back in the same step
    for request in order:
        if not request.admitted and not _admit(ledger, request):
            break  # those behind must not overtake for ever one that needs more room
    return ledger.done()


def _grow(ledger: _Ledger, request: RequestState, order: Sequence[RequestState]) -> None:
    """Half as much again; if there is no room, the least urgent running request gives way."""
    held = request.held_capacity
    for wanted in (held + held // 2, request.num_tokens):
        capacity = ledger.capacity_for(max(wanted, request.num_tokens))
        growth_bytes = ledger.growth_bytes(held, capacity)
        if ledger.make_available(growth_bytes):
            ledger.available_bytes -= ledger.layout.capacity_bytes(capacity - held)
            ledger.grow.append((request.request_id, capacity))
            return
    for victim in reversed(order):
        if not victim.admitted or victim.request_id in ledger.preempt:
            continue
        ledger.preempt.append(victim.request_id)
        ledger.available_bytes += ledger.layout.capacity_bytes(victim.held_capacity)
        if victim.request_id == request.request_id:
            return
        if ledger.make_available(growth_bytes):
            ledger.available_bytes -= ledger.layout.capacity_bytes(capacity - held)
            ledger.grow.append((request.request_id, capacity))
            return


def _admit(ledger: _Ledger, request: RequestState) -> bool:
    held = request.held_capacity
    capacity = ledger.capacity_for(request.num_tokens + request.reserve_tokens)
    if held >= request.num_tokens:
        ledger.admit.append((request.request_id, held))
        return True
    if held == 0:
        needed_bytes = kept_bytes = ledger.layout.capacity_bytes(capacity)
    else:
        needed_bytes = ledger.growth_bytes(held, capacity)
        kept_bytes = ledger.layout.capacity_bytes(capacity - held)
    if not ledger.make_available(needed_bytes):
        return False
    ledger.available_bytes -= kept_bytes
    ledger.admit.append((request.request_id, capacity))
    return True


def _last_used(session: IdleSession) -> float:
    return session.last_used_ms
