"""Who goes first, and who gives way to whom: what the scheduler asks a policy."""

# ruff: noqa: ARG002 - a policy need not look at all it is shown

from typing import Protocol

from edgekv.sched.cost import CostModel
from edgekv.sched.plan import RequestState, Snapshot


class Policy(Protocol):
    """Order among requests. Pure: the same values give the same answers.

    A policy of your own inherits from this, so that it gets the defaults.
    """

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
