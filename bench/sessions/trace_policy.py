"""Scheduling by the ranks of a trace, for `bench switch`."""

from collections.abc import Mapping

from edgekv.bench.sessions.trace import RankTrace
from edgekv.sched.cost import CostModel
from edgekv.sched.plan import RequestState, Snapshot
from edgekv.sched.policy import Policy


class TracePolicy(Policy):
    """The lowest rank goes first, and may take the memory of any request with a higher one.

    As in FastSwitch's workloads, nothing else counts: no classes, no service, no minimum stay.

    Args:
        trace: Ranks by session number and steps.
        sessions: Session number by app; all others go last.
    """

    def __init__(self, trace: RankTrace, sessions: Mapping[str, int]) -> None:
        self._trace = trace
        self._sessions = sessions

    def order(self, now_ms: float, snapshot: Snapshot, cost: CostModel) -> list[RequestState]:
        """By rank."""
        del now_ms, cost
        return sorted(
            snapshot.requests, key=lambda r: (self._rank(r, snapshot), r.arrival_ms, r.request_id)
        )

    def may_preempt(
        self, waiting: RequestState, running: RequestState, now_ms: float, snapshot: Snapshot
    ) -> bool:
        """Whether `running` ranks behind `waiting`."""
        del now_ms
        return self._rank(waiting, snapshot) < self._rank(running, snapshot)

    def _rank(self, request: RequestState, snapshot: Snapshot) -> float:
        session = self._sessions.get(request.app)
        return 1.0 if session is None else self._trace.rank(session, snapshot.num_steps)
