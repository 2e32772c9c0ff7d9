"""Who goes first, and who gives way to whom: what the scheduler asks a policy. Pure."""

# ruff: noqa: ARG002 - a policy need not look at all it is shown

from typing import Protocol

from edgekv.config import PolicyName, Priority
from edgekv.sched.cost import EMPTY_STEP, CostModel
from edgekv.sched.fairness import QUANTUM_MS, aged
from edgekv.sched.plan import Place, PlaceOf, RequestState, Snapshot

# A residency is at least so many times as long as what bringing the KV back costs: switching may
# take a tenth of the service.
RESIDENCY_PER_RESTORE = 10.0
# Longest turn that is owed to a long answer alone, however long it has been.
TURN_MAX_MS = 20 * QUANTUM_MS

_AGED, _INTERACTIVE, _BACKGROUND = range(3)  # most urgent first


class Policy(Protocol):
    """Order among requests. Pure: the same values give the same answers.

    Requests go by the place of their app, then by their own urgency, lowest first, then by arrival.
    Time alone changes nothing in the order of one app's requests that do not decode.
    """

    def place(self, app: str, priority: Priority, now_ms: float, snapshot: Snapshot) -> Place:
        """Where an app's requests of a class stand among those of others."""
        return ()

    def urgency(
        self, request: RequestState, now_ms: float, restore_ms_per_token: float, cost: CostModel
    ) -> float:
        """Where a request stands among those of its app and class."""
        return request.arrival_ms

    def order(self, now_ms: float, snapshot: Snapshot, cost: CostModel) -> list[RequestState]:
        """All requests of the snapshot, most urgent first."""
        place_of = self.places(now_ms, snapshot)
        per_token = snapshot.restore_ms_per_token

        def key(request: RequestState) -> tuple[Place, float, float, int]:
            place = place_of(request.app, request.priority)
            urgency = self.urgency(request, now_ms, per_token, cost)
            return (place, urgency, request.arrival_ms, request.request_id)

        return sorted(snapshot.requests, key=key)

    def places(self, now_ms: float, snapshot: Snapshot) -> PlaceOf:
        """`place` of this moment, found once for each app."""
        known: dict[tuple[str, Priority], Place] = {}

        def place_of(app: str, priority: Priority) -> Place:
            place = known.get((app, priority))
            if place is None:
                place = self.place(app, priority, now_ms, snapshot)
                known[app, priority] = place
            return place

        return place_of

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


class FairPolicy(Policy):
    """Classes in strict order, apps by virtual time, an app's requests by what is left of them.

    Of the background class, apps that were kept from all service for too long go first for a
    quantum, all of them together. Virtual times are compared in quanta: within one, the order is by
    requests alone, so that prompts of equal apps are not cut into slices for nothing. Among the
    requests of a quantum the one that is soonest done goes first, less the time it has waited:
    short prompts overtake long ones, but none waits longer behind later ones than its own prefill
    takes.
    """

    def place(self, app: str, priority: Priority, now_ms: float, snapshot: Snapshot) -> Place:
        """By class, then by virtual time in quanta."""
        return (_class_of(app, priority, now_ms, snapshot), _quantum_of(app, snapshot))

    def urgency(
        self, request: RequestState, now_ms: float, restore_ms_per_token: float, cost: CostModel
    ) -> float:
        """Milliseconds until its next token, less those that it has waited.

        Decoding requests have no turn to wait for. Where one must give way it is the one that got
        most.
        """
        if request.decoding:
            return request.resident_ms
        kept = max(request.num_computed, request.num_stored)
        rows_ms = cost.added_ms(EMPTY_STEP.plus(max(0, request.num_tokens - kept), kept))
        restore_ms = (kept - request.num_computed) * restore_ms_per_token
        since_ms = request.arrival_ms if request.admitted else request.queued_ms
        waited_ms = now_ms - (request.arrival_ms if since_ms is None else since_ms)
        return rows_ms + restore_ms - waited_ms

    def may_preempt(
        self, waiting: RequestState, running: RequestState, now_ms: float, snapshot: Snapshot
    ) -> bool:
        """Background gives way at once; a class's own after a minimum of service, in turns."""
        ours = _class_of(waiting.app, waiting.priority, now_ms, snapshot)
        theirs = _class_of(running.app, running.priority, now_ms, snapshot)
        if ours != theirs:
            return ours < theirs and (theirs == _BACKGROUND or _had_its_turn(running, snapshot))
        if not _had_its_turn(running, snapshot):
            return False
        # One restore at a time: the others' steps go on behind it.
        if waiting.num_stored and snapshot.restoring:
            return False
        if waiting.app == running.app:
            return True
        return _quantum_of(waiting.app, snapshot) < _quantum_of(running.app, snapshot)

    def in_background(self, request: RequestState, now_ms: float, snapshot: Snapshot) -> bool:
        """The background class, but for who was kept waiting too long."""
        return _class_of(request.app, request.priority, now_ms, snapshot) == _BACKGROUND


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


def _class_of(app: str, priority: Priority, now_ms: float, snapshot: Snapshot) -> int:
    if priority == "interactive":
        return _INTERACTIVE
    is_aged = aged(snapshot.app(app), now_ms, snapshot.aged_turn_ms)
    return _AGED if is_aged else _BACKGROUND


def _quantum_of(app: str, snapshot: Snapshot) -> int:
    """The app's virtual time in quanta of the app that has the largest weight."""
    return int(snapshot.app(app).virtual_ms * snapshot.weight_max / QUANTUM_MS)
