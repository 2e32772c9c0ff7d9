"""Sessions and requests of the make-believe engine, and how long its swaps take."""

from dataclasses import dataclass, field

from edgekv.config import Priority
from edgekv.ids import RequestId, SessionId
from edgekv.sched.plan import RequestState


@dataclass(kw_only=True, eq=False)
class SimSession:
    """A session's KV: how much room, how many tokens of it are valid, how many are on disk."""

    session_id: SessionId
    app: str
    capacity: int = 0
    num_valid: int = 0
    num_stored: int = 0
    leaving_until_ms: float = 0.0
    last_used_ms: float = 0.0
    free_ms: float = 0.0
    busy: bool = False


@dataclass(kw_only=True, eq=False)
class SimRequest:
    """One request; `first_token_ms` and `gaps_ms` are what its caller sees."""

    request_id: RequestId
    session: SimSession
    num_prompt: int
    num_output: int
    arrival_ms: float
    priority: Priority = "interactive"
    reserve_tokens: int = 64
    num_tokens: int = 0
    num_computed: int = 0
    admitted: bool = False
    arriving_until_ms: float | None = None
    queued_ms: float | None = None
    served_ms: float | None = None
    resident_ms: float = 0.0
    service_ms: float = 0.0
    num_preempted: int = 0
    first_token_ms: float | None = None
    last_token_ms: float = 0.0
    finished_ms: float | None = None
    gaps_ms: list[float] = field(default_factory=list)
    _waiting_state: RequestState | None = None

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt

    def state(self, now_ms: float) -> RequestState:
        """As the scheduler sees it. It stays the same object while the request waits."""
        if self.admitted:
            self._waiting_state = None
            return self._state(leaving=False)
        leaving = self.session.leaving_until_ms > now_ms
        if self._waiting_state is None or self._waiting_state.leaving != leaving:
            self._waiting_state = self._state(leaving=leaving)
        return self._waiting_state

    def waiting_changed(self) -> None:
        """What the scheduler saw of it while it waited holds no more."""
        self._waiting_state = None

    def _state(self, *, leaving: bool) -> RequestState:
        return RequestState(
            request_id=self.request_id,
            priority=self.priority,
            arrival_ms=self.arrival_ms,
            admitted=self.admitted,
            held_capacity=self.session.capacity,
            num_tokens=self.num_tokens,
            num_computed=self.num_computed,
            num_prompt=self.num_prompt,
            reserve_tokens=self.reserve_tokens,
            app=self.session.app,
            session_id=self.session.session_id,
            num_stored=self.session.num_stored,
            arriving=self.arriving_until_ms is not None,
            leaving=leaving,
            queued_ms=self.queued_ms,
            served_ms=self.served_ms,
            resident_ms=self.resident_ms,
            service_ms=self.service_ms,
        )


@dataclass(frozen=True, kw_only=True)
class SimSwap:
    """How long bytes take; restores follow one another."""

    restore_ms_per_token: float = 0.02
    leave_ms_per_token: float = 0.05
