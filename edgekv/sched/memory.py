"""Who gets KV buffers: growth of what runs, then admission of what waits. Pure."""

import bisect
import functools
from collections.abc import Callable, Sequence

from edgekv.kv.layout import KVLayout
from edgekv.sched.draft import Draft
from edgekv.sched.plan import MemoryPlan, RequestState, Snapshot

# Whether, to admit a waiting request, a running one may be swapped out.
MayPreempt = Callable[[RequestState, RequestState], bool]


@functools.lru_cache(maxsize=16)
def tokens_max(layout: KVLayout, budget_bytes: int) -> int:
    """Most tokens that one session can ever hold in a pool of this budget.

    Sessions get buffers by capacity class, so it is the largest class that fits.
    """
    tokens = range(1, layout.context_max + 1)
    return bisect.bisect_right(
        tokens, budget_bytes, key=lambda n: layout.capacity_bytes(layout.capacity_for(n))
    )


def plan_memory(
    snapshot: Snapshot, order: Sequence[RequestState], may_preempt: MayPreempt
) -> MemoryPlan:
    """Grow what runs out of room, then admit what waits; `order` is most urgent first."""
    if not _may_change(snapshot):
        return MemoryPlan()
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


def _may_change(snapshot: Snapshot) -> bool:
    """Whether somebody wants memory, or too much of it is in use: mostly neither."""
    budget_bytes = snapshot.pool.sessions_bytes
    if snapshot.soft_budget_bytes is not None:
        budget_bytes = min(budget_bytes, snapshot.soft_budget_bytes)
    if snapshot.pool.used_bytes - snapshot.leaving_bytes > budget_bytes:
        return True
    return any(
        r.num_tokens > r.held_capacity if r.admitted else not r.leaving for r in snapshot.requests
    )


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
    is_behind = True
    victims = []
    for victim in reversed(order):
        if victim is request:
            is_behind = False
        if not victim.admitted or victim.arriving or victim.request_id in draft.settled:
            continue
        held_bytes = draft.layout.capacity_bytes(victim.held_capacity)
        borrows = (
            claims and victim.app != request.app and draft.fits_beside_pins(victim, held_bytes)
        )
        if borrows or (is_behind and (may_preempt is None or may_preempt(request, victim))):
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
    wanted_bytes = draft.layout.capacity_bytes(_wanted_capacity(draft, request))
    return wanted_bytes - draft.layout.capacity_bytes(request.held_capacity)


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
