"""Who goes first, and who gives way to whom: what the scheduler asks a policy. Pure."""

# ruff: noqa: ARG002 - a policy need not look at all it is shown

from typing import Protocol

from edgekv.config import PolicyName, Priority
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import QUANTUM_MS, aged
from edgekv.sched.plan import RequestState, Snapshot

# A residency is at least so many times as long as what bringing the KV back costs: switching may
# take a tenth of the service.
RESIDENCY_PER_RESTORE = 10.0
# Longest turn that is owed to a long answer alone, however long it has been.
TURN_MAX_MS = 20 * QUANTUM_MS

_AGED, _INTERACTIVE, _BACKGROUND = range(3)  # most urgent first


class Policy(Protocol):
    """Order among requests. Pure: the same values give the same answers."""

    def order(self, now_ms: float, snapshot: Snapshot, cost: CostModel) -> list[RequestState]:
        """All requests of the snapshot, most urgent first."""
        ...

    def may_preempt(
        self, waiting: RequestState, running: RequestState, now_ms: float, snapshot: Snapshot
    ) -> bool:
        """Whether `running` may be swapped out so that `waiting` can be admitted."""
        return False

    def in_background(self, request: RequestState, now_ms: float, snapshot: Snapshot) -> bool:
        """Whether a request only gets what others leave of a step."""
        return False


class FcfsPolicy(Policy):
    """First come, first served: no classes, and nobody is preempted to admit another."""

    def order(self, now_ms: float, snapshot: Snapshot, cost: CostModel) -> list[RequestState]:
        """By arrival."""
        return sorted(snapshot.requests, key=lambda r: (r.arrival_ms, r.request_id))


class FairPolicy(Policy):
    """Classes in strict order, apps by virtual time, an app's requests by what is left of them.

    Of the background class, an app that was kept from all service for too long goes first for a
    quantum. Virtual times are compared in quanta: within one, the order is by requests alone, so
    that prompts of equal apps are not cut into slices for nothing. Among the requests of a quantum
    the one that is soonest done goes first, less the time it has waited: short prompts overtake
    long ones, but none waits longer behind later ones than its own prefill takes.
    """

    def order(self, now_ms: float, snapshot: Snapshot, cost: CostModel) -> list[RequestState]:
        """By class, virtual time in quanta, and urgency."""
        places: dict[tuple[str, Priority], tuple[int, int]] = {}  # of an app, once a plan

        def key(request: RequestState) -> tuple[tuple[int, int], float, float, int]:
            who = (request.app, request.priority)
            if who not in places:
                quantum = _quantum_of(request, snapshot)
                places[who] = (_class_of(request, now_ms, snapshot), quantum)
            urgency_ms = _urgency(request, now_ms, snapshot, cost)
            return (places[who], urgency_ms, request.arrival_ms, request.request_id)

        return sorted(snapshot.requests, key=key)

    def may_preempt(
        self, waiting: RequestState, running: RequestState, now_ms: float, snapshot: Snapshot
    ) -> bool:
        """Background gives way at once; a class's own after a minimum of service, in turns."""
        ours = _class_of(waiting, now_ms, snapshot)
        theirs = _class_of(running, now_ms, snapshot)
        if ours != theirs:
            return ours < theirs and (theirs == _BACKGROUND or _had_its_turn(running, snapshot))
        if not _had_its_turn(running, snapshot):
            return False
        # One restore at a time: the others' steps go on behind it.
        if waiting.num_stored and snapshot.restoring:
            return False
        if waiting.app == running.app:
            return True
        return _quantum_of(waiting, snapshot) < _quantum_of(running, snapshot)

    def in_background(self, request: RequestState, now_ms: float, snapshot: Snapshot) -> bool:
        """The background class, but for who was kept waiting too long."""
        return _class_of(request, now_ms, snapshot) == _BACKGROUND


def policy_of(name: PolicyName) -> Policy:
    """The policy that a configuration names."""
    return FairPolicy() if name == "fair" else FcfsPolicy()


def min_residency_ms(request: RequestState, snapshot: Snapshot) -> float:
    """Service that an admitted request gets before its own class may preempt it.

    As much as it had before, so that the number of its preemptions grows with the logarithm of its
    length (the queues of FastServe, arXiv 2305.05920, do the same), up to a limit.
    """
    restore_ms = request.num_computed * snapshot.restore_ms_per_token
    before_ms = min(request.service_ms - request.resident_ms, TURN_MAX_MS)
    return max(QUANTUM_MS, RESIDENCY_PER_RESTORE * restore_ms, before_ms)


def _had_its_turn(request: RequestState, snapshot: Snapshot) -> bool:
    return request.resident_ms >= min_residency_ms(request, snapshot)


def _class_of(request: RequestState, now_ms: float, snapshot: Snapshot) -> int:
    if request.priority == "interactive":
        return _INTERACTIVE
    return _AGED if aged(snapshot.app(request.app), now_ms) else _BACKGROUND


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
